"""How many cores a process may use, by its affinity and by control groups of both versions."""

import math
import os

import pytest
from conftest import fresh_process

from tersenet import cores


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("0::/slice/own\n", {"slice/cpu.max": "300000 100000", "slice/own/cpu.max": "max 100000"}, 3),
        ("0::/host/only\n", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/../outside\n", {"cpu.max": "50000 100000"}, 0.5),
        ("3:cpu:/docker/a\n0::/\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("3:cpu:/\n2:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "1", "cpu,cpuacct/cpu.cfs_period_us": "4"}, 0.25),
        ("", {"cpu.max": "50000 100000"}, math.inf),
    ],
)
def test_the_least_share_of_all_groups_counts(tmp_path, groups, files, expected):
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.quota(tmp_path) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.2, 1), (1.0, 1), (1.5, 2)])
def test_a_share_is_rounded_up_to_whole_cores(monkeypatch, share, expected):
    monkeypatch.setattr(cores, "quota", lambda: share)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    assert cores.usable() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux tells")
def test_cores_of_others_do_not_count():
    one = min(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, {{{one}}}); from tersenet import cores; print(cores.usable())"
    assert fresh_process(script) == "1\n"
