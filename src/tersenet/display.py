"""What long work shows while it runs: bars on a terminal, a line now and then where a command's words go elsewhere.

What is done within other work has its bar below that one's. Each thread has bars of its own, and those of one thread at
a time are drawn. From Python nothing is shown where stderr is no terminal.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

Item = TypeVar("Item")
PAUSE = 30.0  # seconds from the first bar to the first line, and from one line to the next, at least
TERMINAL = threading.Lock()  # held by whose bars are drawn


@dataclass(eq=False)
class Bar:
    """Work that goes on: what it is, how much of it is done, what was last said of it, and the best so far by cost."""

    label: str
    total: int | None = None
    begun: float = field(default_factory=time.monotonic)
    done: int = 0
    item: str = ""
    said: str = ""
    best: tuple[float, str] | None = None

    @property
    def title(self) -> str:
        return _printable(f"{self.label} {self.item}".rstrip())

    def progress(self) -> str:
        """How much is done and how long the rest takes at this pace or, where no end is known, the time until now."""
        passed = time.monotonic() - self.begun
        if self.total is None:
            return str(timedelta(seconds=round(passed)))
        left = round(passed / self.done * (self.total - self.done)) if self.done else 0
        return f"{self.done}/{self.total}" + (f", about {timedelta(seconds=left)} left" if left else "")

    def news(self) -> list[str]:
        return [_printable(text) for text in (self.said, self.best and f"best so far: {self.best[1]}") if text]


class Display:
    """The bars of a thread, the outermost first; with `lines`, lines where they cannot be drawn."""

    def __init__(self, lines: bool = False) -> None:
        self.bars, self.lines = list[Bar](), lines
        self.live: Any = None
        self.done, self.before = "", math.inf  # what was done since the last line, and when that was

    def begin(self, bar: Bar) -> None:
        """Add a bar below the others."""
        self.bars.append(bar)
        self.before = min(self.before, time.monotonic())
        if self.live is None and _terminal() and TERMINAL.acquire(blocking=False):
            self.live = _live(self)
            self.live.start()
        self.tell()

    def end(self, bar: Bar) -> None:
        """Remove a bar and what an error left below it; after the last one the terminal is as it was."""
        if bar in self.bars:
            del self.bars[self.bars.index(bar) :]
        if not self.bars and self.live is not None:
            live, self.live = self.live, None
            try:
                live.stop()
            finally:
                TERMINAL.release()

    def tell(self) -> None:
        """Write a line of all bars, if it is time for one."""
        if self.lines and not _terminal() and time.monotonic() - self.before > PAUSE:
            words = [self.done, *(f"{bar.title} {bar.progress()}" for bar in self.bars), self.news()]
            print("tersenet:", "; ".join(word for word in words if word), file=sys.stderr, flush=True)
            self.done, self.before = "", time.monotonic()

    def news(self) -> str:
        """What was said of the bars, the outermost first."""
        return "; ".join(text for bar in tuple(self.bars) for text in bar.news())


_own: ContextVar[Display | None] = ContextVar("display", default=None)


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar while they are worked on; an item that is a text, as a layer's name, is told."""
    with working(label, total) as bar:
        for bar.done, item in enumerate(items):
            bar.item = item if isinstance(item, str) else ""
            _display().tell()
            yield item


@contextlib.contextmanager
def working(label: str, total: int | None = None) -> Iterator[Bar]:
    """Show that something is worked on."""
    display, bar = _display(), Bar(label, total)
    try:
        display.begin(bar)
        yield bar
    finally:
        display.end(bar)


def say(text: str) -> None:
    """Tell what the innermost work has come to."""
    for bar in _display().bars[-1:]:
        bar.said = text


def best_so_far(cost: float, text: str) -> None:
    """Tell what the innermost work has found, if it costs less than all that it found before."""
    for bar in _display().bars[-1:]:
        if bar.best is None or cost < bar.best[0]:
            bar.best = cost, text


def finished(text: str) -> None:
    """Tell what was done: above the bars, or in the next line."""
    display = _display()
    display.done = _printable(text)
    if _terminal():
        from rich.console import Console

        console = display.live.console if display.live else Console(stderr=True)
        console.print(display.done, style="dim", highlight=False, markup=False)


@contextlib.contextmanager
def plain_lines() -> Iterator[None]:
    """Within it lines are written to stderr where that is no terminal."""
    before = _own.set(Display(lines=True))
    try:
        yield
    finally:
        _own.reset(before)


def _display() -> Display:
    display = _own.get()
    if display is None:
        display = Display()
        _own.set(display)
    return display


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _live(display: Display) -> Any:
    """Rich's display of the bars and, below them, of what was said."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    def drawn() -> Group:
        grid = Table.grid(padding=(0, 1))
        for depth, bar in enumerate(tuple(display.bars)):
            line = ProgressBar(bar.total, bar.done, width=20) if bar.total else ""
            title = Text("  " * depth + bar.title, no_wrap=True, overflow="ellipsis")
            grid.add_row(title, line, Text(bar.progress(), no_wrap=True))
        return Group(grid, Text(display.news(), style="dim", no_wrap=True, overflow="ellipsis"))

    # What is printed meanwhile goes above the bars, but not what goes to a file or a pipe.
    piped = sys.stdout is None or not sys.stdout.isatty()
    console = Console(stderr=True)
    return Live(get_renderable=drawn, console=console, transient=True, redirect_stdout=not piped)


def _printable(text: str) -> str:
    """Text that may hold names of others without what would move the cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)
