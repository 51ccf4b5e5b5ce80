"""What long work shows: bars on a terminal that is left clean, lines elsewhere, nothing where nobody asked."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_cli import home  # noqa: F401

from tersenet import display
from tersenet.display import best_so_far, finished, plain_lines, progress, say, working
from tersenet.journal import Journal

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
NESTED = """
import sys, time
from tersenet.display import best_so_far, finished, progress, working
with working("stage 1 of 1: Prune"):
    for layer in progress(["conv\\x1b[2J", "[red]fc[/red]"], "pruning", 2):
        for epoch in progress(range(3), "epochs", 3):
            best_so_far(-epoch, f"metric 0.{epoch}")
            time.sleep(0.3)
        print("done with", ascii(layer))
    finished("stage Prune(rules=[])  metric 0.9")
"""


def on_terminal(script, stop_at=None, stdout=subprocess.PIPE):
    """What a script writes to stderr, a terminal, and to stdout, a pipe; a text at which it is interrupted."""
    pty = pytest.importorskip("pty", reason="terminals as POSIX has them")
    leader, follower = pty.openpty()
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", heard + script]
    process = subprocess.Popen(command, stdout=stdout, stderr=follower, text=True, env=environment)
    os.close(follower)
    said = b""
    while True:
        try:
            part = os.read(leader, 1 << 16)
        except OSError:  # the other side was closed
            break
        if not part:
            break
        said += part
        if stop_at is not None and stop_at in said:
            process.send_signal(signal.SIGINT)
            stop_at = None
    os.close(leader)
    printed = process.communicate(timeout=60)[0]
    return said.decode(), printed, process.returncode


def screen(said):
    """The lines that are left on a terminal: what of its language is used here."""
    rows, at = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", said):
        if part == "\n":
            at += 1
            rows += [""] * (at == len(rows))
        elif part == "\x1b[1A":
            at -= 1
        elif part == "\x1b[2K":
            rows[at] = ""
        elif part not in ("\r", HIDE, SHOW) and not part.endswith("m"):
            rows[at] += part
    return [row.rstrip() for row in rows if row.strip()]


def test_work_within_work_shares_one_display_and_leaves_the_terminal_clean():
    said, printed, code = on_terminal(NESTED)
    assert code == 0 and printed == "done with 'conv\\x1b[2J'\ndone with '[red]fc[/red]'\n"  # the pipe has it all
    assert said.count(HIDE) == said.count(SHOW) == 1 and said.index(HIDE) < said.index(SHOW)
    assert screen(said) == ["stage Prune(rules=[])  metric 0.9"]
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    for text in ("stage 1 of 1: Prune", "pruning conv?[2J", "pruning [red]fc[/red]", "epochs", "2/3", "1/2"):
        assert text in drawn
    assert "best so far: metric 0.2" in drawn and "left" in drawn
    assert drawn.count("stage Prune(rules=[])  metric 0.9") == 1


def test_an_interrupt_leaves_the_terminal_clean_even_where_frames_live_on():
    script = NESTED.replace("with working", "held = []\ntry:\n  with working", 1).replace("\n    ", "\n      ")
    script += "except KeyboardInterrupt as stop:\n    held.append(stop)\n    print('after', file=sys.stderr)\n"
    said, _, code = on_terminal(script, stop_at=b"best so far")
    assert code == 0 and said.count(SHOW) == 1 and screen(said) == ["after"]


def test_from_python_nothing_is_shown_where_there_is_no_terminal(capfd):
    with working("stage"):
        for _ in progress(range(3), "layers", 3):
            say("loss 0.1")
    finished("stage Prune")
    assert capfd.readouterr() == ("", "")


def test_lines_tell_all_bars_and_no_more_often_than_they_may(capfd, monkeypatch):
    with plain_lines(), working("stage 1 of 2: Prune"):
        list(progress(range(1000), "layers", 1000))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(display, "PAUSE", 0.0)
    with plain_lines():
        finished("stage Narrow  bytes 120")
        with working("stage 2 of 2: Prune"):
            for name in progress(["conv1", "fc\n1"], "layer", 2):
                time.sleep(0.01)
                best_so_far(len(name), f"error {len(name)}")
                Journal().write(epoch=3, loss=0.0213456, rate=0.1, training="tuning")
    out, lines = capfd.readouterr()
    assert not out and all(line.startswith("tersenet: ") for line in lines.splitlines())
    first, *_, last = lines.splitlines()
    assert first.startswith("tersenet: stage Narrow  bytes 120; stage 2 of 2: Prune 0:00:00")
    assert last.endswith("layer fc?1 1/2; loss 0.021346; best so far: error 5")
    assert lines.count("Narrow") == 1


def test_the_best_is_that_of_least_cost_and_goes_with_its_work():
    with plain_lines(), working("tries") as outer:
        for cost in (3.0, 1.0, 2.0):
            best_so_far(cost, f"cost {cost}")
        with working("layers") as inner:
            best_so_far(9.0, "cost 9.0")
            assert inner.news() == ["best so far: cost 9.0"]
        say("bytes 12,345")
        assert outer.news() == ["bytes 12,345", "best so far: cost 1.0"]


def test_work_that_was_left_half_done_goes_with_what_it_was_part_of():
    with plain_lines():
        with pytest.raises(KeyError), working("stage"):
            left = progress(range(9), "layers", 9)
            next(left)
            raise KeyError
        assert not display._display().bars
        with working("next") as bar:
            left.close()
            assert display._display().bars == [bar]


def test_threads_have_bars_of_their_own():
    met = threading.Barrier(4)

    def work(number):
        seen = []
        for _ in progress(range(3), f"thread {number}", 3):
            met.wait()
            seen.append([bar.title for bar in display._display().bars])
        return seen

    with plain_lines(), working("all") as bar, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [[[f"thread {k}"]] * 3 for k in range(4)]
        assert display._display().bars == [bar]


def test_threads_that_work_at_once_do_not_fight_for_the_terminal():
    script = """
import threading, time
from tersenet.display import progress
met = threading.Barrier(2)
def work(name):
    for _ in progress(range(3), name, 3):
        met.wait()
        time.sleep(0.2)
threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
[t.start() for t in threads]; [t.join() for t in threads]
for _ in progress(range(2), "after", 2): time.sleep(0.2)
"""
    said, _, code = on_terminal(script)
    assert code == 0 and said.count(HIDE) == said.count(SHOW) == 2 and screen(said) == []
    assert ("one" in said) != ("two" in said) and "after" in said


def test_the_command_writes_lines_where_there_is_no_terminal(home):  # noqa: F811
    script = "import sys, tersenet.display as display; display.PAUSE = 0.0\nfrom tersenet.cli import main; main()"
    command = [sys.executable, "-c", script, "compress", "--task", home / "task.py", "--recipe", "deep-compression"]
    command += ["--drop", "50", "-o", home / "a.terse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("tersenet: ") for line in lines)
    for text in ("tries of the density 1/4", "stage 2 of 8: Round", "pruning, round 2 of 5, epochs", "best so far: "):
        assert any(text in line for line in lines), text
    assert "wrote" in done.stdout and "tersenet: " not in done.stdout
