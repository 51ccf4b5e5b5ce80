"""What a new user copies from the README runs as it stands."""

import re
from pathlib import Path

from conftest import fresh_process

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_of_the_readme_runs_and_writes_its_file(tmp_path):
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code) == 1
    said = fresh_process(f"import os; os.chdir({str(tmp_path)!r})\n{code[0]}")
    assert (tmp_path / "model.terse").stat().st_size * 8 <= 4 * 6902
    assert "bits each" in said and "0.weight" in said and "by the rule '2.*'" in said
