"""What a file must keep to: bytes, a ratio, or a drop of the metric."""

import re
from dataclasses import dataclass


class PromiseBroken(RuntimeError):
    """The result is larger, or worse, than the budget allows."""


class UnmetBudget(PromiseBroken, ValueError):
    """No setting keeps to a budget in bytes: `least` is the smallest file seen; `why` says what stands in the way."""

    def __init__(self, most: int, least: int, why: str = "") -> None:
        super().__init__(f"the budget of {most:,} bytes cannot be met: {least:,} is the least{why}")
        self.most, self.least, self.why = most, least, why


@dataclass(frozen=True)
class Budget:
    """What the file must keep to: bytes (`size`, e.g. 40000 or "40kB"), a ratio to 32-bit weights, or a drop in points.

    >>> Budget(size="1.5kB").bytes_for(0)
    1500
    >>> Budget(ratio=8).bytes_for(1000)
    500
    """

    size: int | str | None = None
    ratio: float | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("size", "ratio", "drop") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("a budget is one of size, ratio and drop")
        if isinstance(self.size, str):
            object.__setattr__(self, "size", parse_size(self.size))
        if (getattr(self, given[0]) or 0) < 0 or (given[0] != "drop" and not getattr(self, given[0])):
            raise ValueError(f"a budget's {given[0]} is above 0")

    def bytes_for(self, weights: int) -> int | None:
        """The most bytes that a network of so many weights may take, or None for a budget in accuracy."""
        if self.ratio is not None:
            return int(4 * weights / self.ratio)
        return None if self.size is None else int(self.size)


def parse_size(text: str) -> int:
    """Bytes: a number with B, kB, MB, GB (powers of ten) or KiB, MiB, GiB."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kMG]?i?)B?\s*", text, re.IGNORECASE)
    units = {"": 1, "k": 1000, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
    try:
        assert match is not None
        return int(float(match[1]) * units[match[2].lower()])
    except (AssertionError, KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size: write 40000, 40kB or 1.5MB") from None
