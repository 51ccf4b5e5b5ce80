"""Runs of LeNet-5 that are killed with SIGKILL at random moments until they are done, and the bytes they end in.

Run: make bench NAME=kill, or bench/kill.py KILLS for fewer than 100 of each of two runs. A run is killed at a moment
drawn from the time that a whole run needs, as long as kills are left; the last child runs to its end. What a kill
costs is the time since the last result or checkpoint that was kept, or since the child began. Runs that end before all
kills are used begin anew in an empty folder. The file must have the bytes of a run that nobody disturbed.
"""

import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from table import real_data, write

import tersenet as tn

SEED, KILLS = 0, 100
RUNS = ("default", "deep-compression")
IMAGES = 2_000  # of the training split: a run should be short against a hundred kills


def child(name: str, folder: Path, file: Path) -> None:
    """One try: compress LeNet-5 and write the file."""
    datasets, models = real_data()
    split = {}
    for part, count in (("train", IMAGES), ("test", 1_000)):
        images, labels = datasets.load("mnist", part, count)
        split[part] = (models.inputs("lenet5", images), torch.from_numpy(labels).long())
    task = tn.Task(models.load("lenet5"), **split, schedule=tn.Schedule(epochs=2, lr=0.02))
    recipe = None if name == "default" else tn.papers.deep_compression(0.1, 5, rounds=2, epochs=2)
    file.write_bytes(tn.compress(task, recipe, folder=folder).artifact.to_bytes())


def start(name: str, folder: Path, file: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, "child", name, str(folder), str(file)], stderr=subprocess.DEVNULL
    )


def last_kept(folder: Path) -> float:
    """When a result or a checkpoint was last kept in the folder, in seconds since 1970; 0 where none was."""
    kept = [*folder.glob("*.terse"), *folder.glob("*/*.kept")]
    return max((path.stat().st_mtime for path in kept), default=0.0)


def measure(name: str, kills: int) -> dict[str, object]:
    draw, lost, done = random.Random(f"{SEED}{name}"), list[float](), 0
    with tempfile.TemporaryDirectory() as place:
        at = Path(place)
        began = time.time()
        if start(name, at / "whole", at / "whole.terse").wait():
            sys.exit(f"{name}: the run fails even when nobody disturbs it")
        need, whole, round_ = time.time() - began, (at / "whole.terse").read_bytes(), 0
        while len(lost) < kills or not done:
            folder, file = at / f"folder-{round_}", at / f"file-{round_}"
            running, began = start(name, folder, file), time.time()
            moment = began + draw.uniform(0, need)
            while running.poll() is None and (time.time() < moment or len(lost) >= kills):
                time.sleep(0.005)
            if running.poll() is None:
                running.kill()
                lost.append(time.time() - max(began, last_kept(folder)))
            elif running.returncode:
                sys.exit(f"{name}: a try failed after {len(lost)} kills")
            else:
                assert file.read_bytes() == whole, f"{name}: other bytes after {len(lost)} kills"
                done, round_ = done + 1, round_ + 1
                print(f"{name}: {len(lost)} of {kills} kills, {done} runs done", file=sys.stderr, flush=True)
            running.wait()
    mark = hashlib.sha256(whole).hexdigest()[:16]
    row = {"network": "lenet5", "run": name, "kills": len(lost), "runs_done": done, "bytes": len(whole), "sha256": mark}
    return {**row, "seconds_undisturbed": round(need, 1), "seconds_lost_at_most": round(max(lost), 1)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        kills = int(sys.argv[1]) if len(sys.argv) > 1 else KILLS
        rows = [measure(name, kills) for name in RUNS]
        if kills == KILLS:
            write("kill", rows, SEED, images=IMAGES)
        else:
            print(*rows, sep="\n")
