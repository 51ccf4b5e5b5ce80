"""Checkpoints as people have them: safetensors, NumPy archives, PyTorch files, shards with their index, folders.

Nothing in a file is ever run: PyTorch files are opened with `weights_only`, NumPy ones without pickles.
"""

import functools
import json
import re
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tersenet.artifact import as_stored

IN_FOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Where training scripts put the network's tensors beside the optimizer's.
NESTED = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "module",
    "ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema",
)  # fmt: skip
# Names in PyTorch files that stand for plain settings and numbers; each is read as an object that holds nothing.
INERT = (
    "argparse.Namespace", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip


@dataclass
class Checkpoint:
    """Named NumPy arrays or torch tensors, the text that a safetensors file carries, words on what was left out."""

    tensors: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


def read(path: Path) -> Checkpoint:
    """The tensors of a checkpoint file, of an index with its shards, or of a folder that holds one of these.

    Raises OSError where there is no such file, ValueError with one line for what cannot be taken in.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    if path.name.endswith(".index.json"):
        found = _sharded(path)
    elif path.suffix.lower() in READERS:
        found = READERS[path.suffix.lower()](path)
    else:
        raise ValueError(f"{path}: give a file that ends in {', '.join(READERS)} or .index.json, or a folder with one")
    if not found.tensors:
        raise ValueError(f"{path}: holds no tensors")
    if wrong := [name for name in found.tensors if any("\ud800" <= c <= "\udfff" for c in name)]:
        raise ValueError(f"{path}: the name {wrong[0]!r} is no text; rename the tensor")
    return found


def _in_folder(folder: Path) -> Path:
    """The checkpoint in a folder: under one of Hugging Face's names, else the only safetensors file."""
    for name in IN_FOLDERS:
        if (folder / name).exists():
            return folder / name
    others = sorted(folder.glob("*.safetensors"))
    if len(others) != 1:
        found = ", ".join(path.name for path in others) or "no .safetensors file"
        raise ValueError(f"{folder}: holds none of {', '.join(IN_FOLDERS)}, and {found}: give the file itself")
    return others[0]


def _sharded(index: Path) -> Checkpoint:
    try:
        places = json.loads(index.read_text())["weight_map"]
        named = {str(name): str(shard) for name, shard in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not an index of shards (JSON with a weight_map)") from None
    found = Checkpoint({})
    for shard in dict.fromkeys(named.values()):
        if Path(shard).suffix not in READERS or shard != Path(shard).name or "\\" in shard:
            raise ValueError(f"{index}: {shard!r} is not the name of a shard beside the index")
        part = read(index.parent / shard)
        for name in (name for name, place in named.items() if place == shard):
            if name not in part.tensors:
                raise ValueError(f"{index}: {name} should be in {shard}, but is not")
            found.tensors[name] = part.tensors[name]
        found.metadata |= part.metadata
        found.words += part.words
    return found


def _safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            return Checkpoint({n: opened.get_tensor(n) for n in opened.keys()}, dict(opened.metadata() or {}))  # noqa: SIM118
    except SafetensorError as wrong:
        raise ValueError(f"{path}: not a whole safetensors file: {wrong}") from None


def _npz(path: Path) -> Checkpoint:
    found = Checkpoint({})
    name = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if member.filename == name:
                    found.words.append(f"left out {name}, which is no array")
                elif "\0" in member.orig_filename or name in found.tensors:
                    raise ValueError(f"{name}: a name with a zero byte, or two arrays of one name")
                else:
                    with archive.open(member) as file:
                        array = np.lib.format.read_array(file, allow_pickle=False)
                        if file.read(1):  # which also has the archive check the array's CRC
                            raise ValueError(f"{name}: bytes follow the array")
                    found.tensors[name] = as_stored(name, array)[0]
    except ValueError as wrong:
        if "Object arrays" in str(wrong):
            wrong = ValueError(f"{name}: an array of objects is never opened; convert it to numbers, or leave it out")
        raise ValueError(f"{path}: {wrong}" if name else f"{path}: not an .npz file of plain arrays: {wrong}") from None
    except (OSError, MemoryError):
        raise
    except Exception as wrong:  # a damaged archive raises almost anything
        raise ValueError(f"{path}: not an .npz file, or not a whole one: {wrong}") from None
    return found


def _torch(path: Path) -> Checkpoint:
    import torch

    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([_inert(name) for name in INERT]):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as wrong:  # a damaged pickle raises almost anything
        if code := re.search(r"GLOBAL (\S+)", str(wrong)):
            reason = f"holds {code[1]}, and code in a checkpoint is never run"
        elif "TorchScript" in str(wrong):
            reason = "is a TorchScript program"
        else:
            raise ValueError(f"{path}: not a whole PyTorch checkpoint") from None
        raise ValueError(f"{path}: {reason}; save the tensors alone: torch.save(model.state_dict(), ...)") from None
    key, state = _state(path, content)
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and _is_tensor(value)}
    words = [f"took the tensors under {key!r}"] if key else []
    if others := [str(name) for name in state if name not in tensors]:
        words.append(f"left out {textwrap.shorten(', '.join(others), 200, placeholder=' ...')}: no tensors")
    return Checkpoint(tensors, words=words)


def _state(path: Path, content: Any) -> tuple[str, Mapping[Any, Any]]:
    """The state dict in what a PyTorch file holds, and the key it lies under, "" for none."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}; save the tensors by name: model.state_dict()")
    inner = [key for key, value in content.items() if _holds_tensors(value)]
    usual = [key for key in inner if key in NESTED]
    if not usual and _holds_tensors(content):
        return "", content
    chosen = usual or inner
    if len(chosen) != 1:
        listed = ", ".join(map(str, content)) or "nothing"
        what = f"more than one network ({', '.join(map(str, chosen))})" if chosen else "no network"
        raise ValueError(f"{path}: holds {what} under its keys {listed}; save the one you mean as a state dict")
    return str(chosen[0]), content[chosen[0]]


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(map(_is_tensor, value.values()))


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "data_ptr")


@functools.cache
def _inert(name: str) -> type:
    """A class of that full name which takes anything and keeps nothing, so that its namesake is never called."""
    module, _, own = name.rpartition(".")

    def ignore(self: Any, *given: Any, **named: Any) -> None:
        pass

    return type(own, (), {"__module__": module, "__init__": ignore, "__setstate__": ignore})


READERS: dict[str, Callable[[Path], Checkpoint]] = {
    ".safetensors": _safetensors, ".npz": _npz, ".pt": _torch, ".pth": _torch, ".bin": _torch, ".ckpt": _torch,
}  # fmt: skip
