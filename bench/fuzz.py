"""Mutated files through the reader, on all cores: each is refused with `FormatError` or decoded, fast and in bounds.

Run: make bench NAME=fuzz for a million files, 200,000 decoded with the C core under sanitizers, and the bombs;
bench/fuzz.py CASES [FIRST] for so many from a number on. A case's number makes its file (`mutated` in
tests/mutations.py): bench/fuzz.py 1 K is case K alone. A case that raises anything else, that needs over 2 seconds of
CPU time or 64 MiB beside the 16 MiB that it may decode to, or that ends its process stops all, with its number.
"""

import collections
import faulthandler
import json
import multiprocessing
import os
import queue
import re
import subprocess
import sys
import tempfile
import time
import warnings
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from table import ROOT, write

sys.path.insert(0, str(ROOT / "tests"))
from bombs import bombs
from mutations import LIMIT, corpus, mutated, outcome

from tersenet import FormatError, load, native
from tersenet.journal import memory

CASES, SANITIZED, SEED = 1_000_000, 200_000, 0
SECONDS, ROOM = 2, 64 << 20
CHECKED = ["-O1", "-g", "-std=c11", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CHECKED += ["-shared", "-fPIC"]


def worker(cases: range, found: "Queue[dict[str, int]]", current: "Synchronized[int]", bounded: bool) -> None:
    """Look at these cases; what they end in goes into the queue."""
    warnings.simplefilter("ignore")  # products that overflow
    kinds, held, call = collections.Counter[str](), peak(), native.call

    def counted(name: str, *arguments: Any) -> int | None:
        kinds["calls"] += name.endswith("_decode")
        return call(name, *arguments)

    native.call = counted
    for number in cases:
        current.value = number
        file, name = mutated(number, SEED)
        faulthandler.dump_traceback_later(100 * SECONDS, exit=True)  # C code that never comes back
        begun = time.process_time()
        kinds[kind(outcome(file, name))] += 1
        spent, grown = time.process_time() - begun, peak() - held
        if bounded and (spent > SECONDS or grown > LIMIT + ROOM):
            raise RuntimeError(
                f"case {number} took {spent:.2f} seconds, and the process has grown by {grown >> 20} MiB"
            )
    faulthandler.cancel_dump_traceback_later()
    found.put(dict(kinds))


def peak() -> int:
    """The most memory that this process ever held, in bytes."""
    return round(1e6 * (memory() or 0))


def kind(text: str) -> str:
    """A refusal without names and numbers."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "...", text)
    return re.sub(r"\b[\d,.]*\d+\w*", "N", text.split(": ", 1)[-1])[:80]


def looked_at(cases: int, first: int, bounded: bool = True) -> dict[str, Any]:
    """All cases, spread over the cores; stops with the number of a case that ends otherwise."""
    corpus()  # which the children then share
    cores = min(os.cpu_count() or 1, cases)
    fork = multiprocessing.get_context("fork")  # children have the files, and the core that was put in place
    found: Queue[dict[str, int]] = fork.Queue()
    begun, kinds = time.time(), collections.Counter[str]()
    children = []
    for k in range(cores):
        current = fork.Value("q", first)
        part = range(first + k, first + cases, cores)
        child = fork.Process(target=worker, args=(part, found, current, bounded), daemon=True)
        child.start()
        children.append((child, current))
    left = cores
    while left:
        try:
            kinds.update(found.get(timeout=5))
            left -= 1
        except queue.Empty:
            if ended := [current.value for child, current in children if child.exitcode]:
                sys.exit(f"\ncase {ended[0]} ended its process: bench/fuzz.py 1 {ended[0]}")
        seen = max(current.value for _, current in children) - first + 1
        print(f"\r{seen:,} of {cases:,} cases, {time.time() - begun:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    row = {"cases": cases, "first": first, "calls_of_decoders": kinds.pop("calls", 0)}
    row |= {"decoded": kinds.pop("decoded", 0), "refused": kinds.total()}
    return {**row, "seconds": round(time.time() - begun, 1), "refusals": dict(kinds.most_common())}


def sanitized(cases: int, first: int, program: str = __file__) -> dict[str, Any]:
    """The same with a C core that stops at the first step outside its bounds or outside what C defines.

    `program` looks at so many cases from a number on with the core at a path, and prints what it found as JSON.
    """
    names = [["gcc", f"-print-file-name=lib{name}.so"] for name in ("asan", "ubsan")]
    preload = ":".join(subprocess.check_output(name, text=True).strip() for name in names)
    with tempfile.TemporaryDirectory() as folder:
        core = Path(folder) / "core.so"
        subprocess.run(["gcc", *CHECKED, *sorted((ROOT / "native").glob("*.c")), "-o", core], check=True)
        more = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
        command = [sys.executable, program, str(cases), str(first), str(core)]
        done = subprocess.run(command, env=os.environ | more, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit("the sanitizers stopped it")
        return json.loads(done.stdout)


def bombs_refused() -> list[dict[str, Any]]:
    """How long each bomb takes to be refused, at its best of five."""
    rows = []
    for name, file in bombs().items():
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            try:
                load(file)
                sys.exit(f"the bomb {name!r} was not refused")
            except FormatError:
                times.append(time.perf_counter() - begun)
        rows.append({"bomb": name, "bytes": len(file), "milliseconds": round(1000 * min(times), 2)})
    return rows


if __name__ == "__main__":
    if len(sys.argv) == 4:
        core = native.opened(Path(sys.argv[3]))
        native.library = lambda: core
        print(json.dumps(looked_at(int(sys.argv[1]), int(sys.argv[2]), bounded=False)))
    elif len(sys.argv) > 1:
        print(json.dumps(looked_at(int(sys.argv[1]), int((*sys.argv, 0)[2])), indent=1))
    else:
        rows = [{"core": "as it is"} | looked_at(CASES, 0), {"core": "sanitized"} | sanitized(SANITIZED, CASES)]
        write("fuzz", [*rows, *bombs_refused()], SEED)
