"""What every benchmark shares: where the real data lies, which machine this is, and how a table is kept."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("TERSENET_DATA", ROOT.parent / "shared" / "data"))


def real_data() -> tuple[Any, Any]:
    """The modules `datasets` and `models` that lie beside the data; stops with a word where there are none."""
    if not (DATA / "datasets.py").exists():
        sys.exit(f"no data at {DATA}: set TERSENET_DATA to the folder that holds datasets.py")
    sys.path.insert(0, str(DATA))
    import datasets
    import models

    return datasets, models


def in_rounds(actions: Sequence[Callable[[], object]], rounds: int = 25) -> list[tuple[float, float]]:
    """Seconds that each action takes, by the clock and of CPU time: medians of rounds over all of them.

    Each time after a run that does not count. A shared machine is slow for seconds at a time, hence the rounds.
    """
    clock: list[list[float]] = [[] for _ in actions]
    spent: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for k, action in enumerate(actions):
            action()
            begun = time.perf_counter(), time.process_time()
            action()
            clock[k].append(time.perf_counter() - begun[0])
            spent[k].append(time.process_time() - begun[1])
    return list(zip(map(statistics.median, clock), map(statistics.median, spent), strict=True))


def earlier(name: str) -> list[dict[str, Any]]:
    """The rows that were kept."""
    path = ROOT / "bench" / "results" / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def put(
    name: str,
    row: dict[str, Any],
    keys: Sequence[str],
    order: Callable[[dict[str, Any]], Any],
    seed: int = 0,
    **more: Any,
) -> None:
    """Print a row and keep it at once, in order, in place of the one that has the same under all of the keys.

    So a run that is stopped loses nothing, and rows that are not run again stay.
    """
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    others = [old for old in earlier(name) if any(old.get(key) != row.get(key) for key in keys)]
    keep(name, sorted([*others, row], key=order), seed, **more)


def keep(name: str, rows: list[dict[str, Any]], seed: int = 0, **more: Any) -> Path:
    """Keep the rows as bench/results/<name>.json with the machine and the commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    table = {"machine": machine(), "commit": commit.stdout.strip(), "seed": seed, **more, "rows": rows}
    path = ROOT / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def write(name: str, rows: list[dict[str, Any]], seed: int = 0, **more: Any) -> None:
    """Keep the rows and print them."""
    path = keep(name, rows, seed, **more)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    print(f"kept as {path.relative_to(ROOT)}")


def machine() -> str:
    """Processor, cores and system in one line."""
    model = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
