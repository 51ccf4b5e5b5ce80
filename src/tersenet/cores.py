"""How many cores this process may use."""

import functools
import math
import os
import sys
from pathlib import Path, PurePosixPath


def usable() -> int:
    """Those that it may run on, or fewer where a container gives it less time; `os.cpu_count` counts all there are."""
    if sys.version_info >= (3, 13):
        allowed = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return math.ceil(min(allowed, quota()))


@functools.cache
def quota(root: Path = Path("/")) -> float:
    """How many cores' time the Linux control groups of this process allow, of version 2 or 1; infinity without a limit.

    Groups lie in each other. In a container their paths may be the host's; then the container's own is the outermost.
    """
    least = math.inf
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / controllers
        group = PurePosixPath(path.lstrip("/"))
        least = min(least, *(_share(mounted / part) for part in (group, *group.parents)))
    return least


def _share(group: Path) -> float:
    text = _text(group / "cpu.max") or f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}"
    try:
        time, period = map(int, text.split())
    except ValueError:  # "max", or none
        return math.inf
    return time / period if time > 0 and period > 0 else math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
