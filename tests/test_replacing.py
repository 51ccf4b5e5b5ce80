"""A file under many hands: savers lose nothing, readers see old or new, and what fails leaves nothing."""

import errno
import multiprocessing
import os
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import floats, fresh_process

from tersenet import load
from tersenet.artifact import Artifact, Coding, Tensor
from tersenet.replacing import write_atomically

FORK = multiprocessing.get_context("fork")
posix = pytest.mark.skipif(os.name != "posix", reason="links and permissions as POSIX has them")


def versions(count):
    """Files of different sizes that each hold one number, over and over."""
    return [Artifact({"w": Tensor(np.full(200 + 700 * k, k, np.float32))}) for k in range(count)]


def number(artifact):
    """The number that all of a file's values are."""
    (found,) = np.unique(artifact.unpack()["w"])
    return int(found)


def test_sixteen_threads_that_save_one_path_lose_nothing(tmp_path):
    path, files = tmp_path / "w.terse", versions(16)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda k: files[k % 16].save(path), range(320)))  # raises what any of them raised
    assert path.read_bytes() in [file.to_bytes() for file in files]
    assert [p.name for p in tmp_path.iterdir()] == ["w.terse"]


def _read_until(path, stop, told):
    """Load the file again and again, whole and lazily, on two threads; tell how often, or what went wrong."""

    def loads(tensors):
        count = 0
        while not stop.is_set() or not count:
            number(load(path, tensors))
            count += 1
        return count

    try:
        with ThreadPoolExecutor(2) as pool:
            told.put(sum(pool.map(loads, (None, ["w"]))))
    except Exception as wrong:
        told.put(repr(wrong))


@posix
def test_eight_processes_of_two_threads_see_the_old_file_or_the_new_one(tmp_path):
    path, files = tmp_path / "w.terse", versions(2)
    data = [file.to_bytes() for file in files]
    write_atomically(path, data[0])
    stop, told = FORK.Event(), FORK.SimpleQueue()
    readers = [FORK.Process(target=_read_until, args=(path, stop, told)) for _ in range(8)]
    for reader in readers:
        reader.start()
    for k in range(250):
        write_atomically(path, data[k % 2])
    stop.set()
    counts = [told.get() for _ in readers]
    for reader in readers:
        reader.join()
    assert all(isinstance(count, int) and count >= 2 for count in counts), counts


def _save(path, data, begin):
    try:
        begin.set()
        write_atomically(path, data)
    except KeyboardInterrupt:
        pass


@posix
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_save_that_is_stopped_leaves_the_old_file_or_the_new_one(tmp_path, end):
    path, coding = tmp_path / "big.terse", Coding(("bits",))
    arrays = (np.arange(50_000_000, dtype=np.uint8), np.random.default_rng(1).integers(0, 255, 50_000_000, np.uint8))
    old, new = (Artifact({"w": Tensor(array, "uint8")}, coding).to_bytes() for array in arrays)
    path.write_bytes(old)
    rng = np.random.default_rng(0)
    for _ in range(25):
        begin = FORK.Event()
        process = FORK.Process(target=_save, args=(path, new, begin))
        process.start()
        begin.wait()
        time.sleep(rng.random() * 0.06)
        os.kill(process.pid, end)
        process.join()
        found = path.read_bytes()
        assert found in (old, new)
        if found == new:
            path.write_bytes(old)
    left = [p for p in tmp_path.iterdir() if p != path]
    assert bool(left) == (end == signal.SIGKILL)  # who is killed cannot clean up
    for part in left:
        os.utime(part, (0, time.time() - 90_000))
    Artifact({"w": Tensor(floats(3))}).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["big.terse"]


def test_only_temporaries_that_are_over_a_day_old_are_removed(tmp_path):
    ages = {".0123456789abcdef.terse-part": 90_000, ".w.terse.17.terse-part": 90_000, ".new.terse-part": 80_000,
            "mine.terse-part": 90_000, ".other": 90_000}  # fmt: skip
    for name, age in ages.items():
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (0, time.time() - age))
    write_atomically(tmp_path / "w", b"new")
    assert {p.name for p in tmp_path.iterdir()} == {".new.terse-part", "mine.terse-part", ".other", "w"}


@posix
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "v1").write_bytes(b"old")
    (tmp_path / "link").symlink_to("store/v1")
    (tmp_path / "way").symlink_to("link")
    (tmp_path / "dangling").symlink_to("store/v2")
    (tmp_path / "loop").symlink_to("loop")
    write_atomically(tmp_path / "way", b"new")
    write_atomically(tmp_path / "dangling", b"first")
    assert (tmp_path / "store" / "v1").read_bytes() == b"new" and (tmp_path / "store" / "v2").read_bytes() == b"first"
    assert all((tmp_path / name).is_symlink() for name in ("link", "way", "dangling"))
    with pytest.raises(OSError, match="loop"):
        write_atomically(tmp_path / "loop", b"new")
    assert (tmp_path / "loop").is_symlink()


@posix
def test_permissions_stay_and_new_files_get_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        for name, mode in {"private": 0o600, "shared": 0o666, "still": 0o444}.items():
            (tmp_path / name).write_bytes(b"old")
            (tmp_path / name).chmod(mode)
            write_atomically(tmp_path / name, b"new")
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode
            assert (tmp_path / name).read_bytes() == b"new"
        write_atomically(tmp_path / "fresh", b"new")
        assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640
    finally:
        os.umask(before)


@posix
def test_what_is_no_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "/dev/null"):
        with pytest.raises(OSError, match=f"is no file; give another name.*{name}"):
            write_atomically(tmp_path / name, b"new")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_names_that_are_patterns_or_as_long_as_can_be_are_names(tmp_path):
    for name in ("[w]*?.terse", "w" * 255, "w\nx", "ключ.terse"):
        write_atomically(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    with pytest.raises(OSError, match="File name too long"):
        write_atomically(tmp_path / ("w" * 256), b"new")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.terse"
    Artifact({"w": Tensor(floats(3))}).save(path)
    before = path.read_bytes()
    script = (
        "import resource, signal, sys, numpy as np\n"
        "from tersenet.artifact import Artifact, Tensor\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    Artifact({'w': Tensor(np.random.rand(5000))}).save(sys.argv[1])\n"
        "except OSError as wrong:\n    print('refused', wrong.errno, wrong.filename)\n"
    )
    assert fresh_process(script, path, check=False).strip() == f"refused {errno.EFBIG} {path}"
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@posix
def test_a_folder_that_cannot_be_written_is_named_and_left_alone(tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir()
    (folder / "w.terse").write_bytes(b"old")
    folder.chmod(0o555)
    script = (
        "import os, sys; from pathlib import Path; from tersenet.replacing import write_atomically\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try:\n    write_atomically(Path(sys.argv[1]), b'new')\n"
        "except PermissionError as wrong:\n    print(wrong)\n"
    )
    for parent in [tmp_path, *tmp_path.parents][:3]:  # which the user that root becomes must pass through
        parent.chmod(parent.stat().st_mode | 0o011)
    said = fresh_process(script, folder / "w.terse")
    folder.chmod(0o755)
    assert "Permission denied" in said and str(folder / "w.terse") in said
    assert [p.name for p in folder.iterdir()] == ["w.terse"] and (folder / "w.terse").read_bytes() == b"old"
