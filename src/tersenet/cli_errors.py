"""What went wrong in a command, in one line."""

import textwrap
import traceback
from pathlib import Path

from tersenet.artifact import printable
from tersenet.codecs import FormatError

EXPECTED = (FormatError, ValueError, OSError, KeyError, MemoryError)


def line_of(wrong: Exception) -> str:
    """What went wrong, in one line."""
    if hasattr(wrong, "format_message"):
        return printable(wrong.format_message())
    text = str(wrong.args[0] if isinstance(wrong, KeyError) and wrong.args else wrong)
    if isinstance(wrong, ImportError) and wrong.name in ("torch", "pydantic", "yaml", "safetensors"):
        text = f"this needs {wrong.name}: pip install 'tersenet[torch]'"
    elif isinstance(wrong, ImportError) and "tersenet[" in text:  # it says itself what to install
        pass
    elif isinstance(wrong, OSError) and wrong.filename is not None:
        text = f"{wrong.filename}: {wrong.strerror}"
    elif not isinstance(wrong, EXPECTED) and "loading state_dict" not in text:
        at = traceback.extract_tb(wrong.__traceback__)[-1]
        text = (
            f"{type(wrong).__name__}: {text} ({Path(at.filename).name}, line {at.lineno}; TERSE_TRACEBACK=1 tells all)"
        )
    return printable(textwrap.shorten(text, 600, placeholder=" ...")) or type(wrong).__name__
