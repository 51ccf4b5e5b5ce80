"""How strong a recipe is: the setting of its own that decides the size of the file, and the search for the size.

A stage with a `budget` takes the size as it is. Else all densities of a recipe, or parts of the MACs or of ranks, or
bits, are made smaller together: a density d becomes d^e, so that rounds of pruning keep their proportions.
"""

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from tersenet.allocators.lagrange import step_within
from tersenet.artifact import Coding
from tersenet.budget import Budget, UnmetBudget
from tersenet.display import best_so_far, progress
from tersenet.run import Recipe, Stage

SETTINGS = ("density", "macs", "part", "scale", "bits")  # the first that a recipe has is its own
# What makes a run a quick one.
UNTRAINED = {"epochs": 0, "final": 0, "tune": 0, "episodes": 1, "candidates": 1, "retrain": "none"}
RUNS, USED = 4, 0.97  # of the whole recipe at most, and the part of the budget from which on a file is good enough
NEAR = 1.1  # times the budget that a file without training may take, so that one with training is tried
STRONGER = 1.5  # from one power to the next, as long as all tried keep a drop, or none does
Found = TypeVar("Found")


def with_budget(recipe: Recipe, budget: Budget, coding: Coding | None) -> Recipe | None:
    """The recipe whose last stage that can takes the budget; None where none can."""
    takes = [k for k, stage in enumerate(recipe) if waits(stage)]
    if not takes:
        return None
    budgeted = replace(recipe[takes[-1]], budget=budget, coding=coding)  # type: ignore[type-var]
    return (*recipe[: takes[-1]], budgeted, *recipe[takes[-1] + 1 :])


def setting(recipe: Recipe) -> str:
    """The name of the setting that decides a recipe's size; raises ValueError where it has none."""
    if not has_setting(recipe):
        raise ValueError(
            f"no setting of this recipe ({_named(recipe)}) decides its size: give it a density, bits, or a Waterfill"
            " stage without a step or a budget of its own"
        )
    return next(name for name in SETTINGS if any(numbers(stage, name) for stage in _free(recipe)))


def _named(recipe: Recipe) -> str:
    return ", ".join(type(stage).__name__ for stage in recipe)


def has_setting(recipe: Recipe) -> bool:
    """Whether a setting of the recipe's own decides its size."""
    return any(numbers(stage, name) for name in SETTINGS for stage in _free(recipe))


def stronger(recipe: Recipe, e: float, name: str | None = None) -> Recipe:
    """The recipe with its own setting at the power e: 1 is the recipe itself, more is smaller.

    >>> from tersenet.stages.prune import Prune
    >>> stronger((Prune(0.5),), 2.0)[0].density
    0.25
    """
    name = name or setting(recipe)
    free = _free(recipe)
    return tuple(
        _changed(stage, lambda field, value: _power(value, e, name) if field == name else value)
        if stage in free
        else stage
        for stage in recipe
    )


def untrained(recipe: Recipe) -> Recipe:
    """The recipe without its training, whose file has about the size of the whole recipe's."""
    return tuple(_changed(stage, UNTRAINED.get) for stage in recipe)


def meeting(
    recipe: Recipe, most: int, run: Callable[[Recipe], tuple[int, Found]], size_of: Callable[[Recipe], int]
) -> Found:
    """What `run` gives for the recipe at the weakest setting found whose file keeps to `most` bytes.

    `run` gives a file's bytes and what it is; `size_of` the bytes of a recipe's file alone, of recipes without their
    training, on which the setting is sought first. A recipe of which no setting decides the size is run as it is.
    Raises UnmetBudget where no setting keeps the size.
    """
    if not has_setting(recipe):
        return _as_it_is(recipe, most, run, size_of)
    name, aim, start = setting(recipe), float(most), 1.0
    best: tuple[int, Found] | None = None
    least = None
    sizes: dict[float, int] = {}

    def quick(e: float) -> int:
        """The bytes without training; 1, or too many, where stages do not take a setting, as they do the recipe's."""
        if e not in sizes:
            try:
                sizes[e] = size_of(untrained(stronger(recipe, e, name)))
            except ValueError:
                if not sizes:
                    raise
                sizes[e] = 1 if e > 1 else max(most + 1, 2 * max(sizes.values()))
        return sizes[e]

    for _ in progress(range(RUNS), f"tries of the {name}", RUNS):
        try:
            at = step_within(quick, max(1, int(aim)), start)
        except UnmetBudget as wrong:
            raise UnmetBudget(most, wrong.least, f" of the recipe's {name}") from None
        if quick(at) == 1:
            least = least or min(size for size in sizes.values() if size > 1)
            break
        if best is not None and quick(at) == quick(start):  # no setting makes more of the budget
            break
        start = at
        size, found = run(stronger(recipe, start, name))
        least = size if least is None else min(least, size)
        if size <= most and (best is None or size > best[0]):
            best = size, found
            best_so_far(-size, f"{size:,} of {most:,} bytes")
        if USED * most <= size <= most:
            break
        aim *= (1 + USED) / 2 * most / size
    if best is None:
        raise UnmetBudget(most, least or 0, f" of the recipe's {name}")
    return best[1]


def _as_it_is(
    recipe: Recipe, most: int, run: Callable[[Recipe], tuple[int, Found]], size_of: Callable[[Recipe], int]
) -> Found:
    least = size_of(untrained(recipe))
    if least <= NEAR * most:
        least, found = run(recipe)
        if least <= most:
            return found
    raise UnmetBudget(most, least, f" of this recipe ({_named(recipe)}), of which no setting decides the size")


def keeping(recipe: Recipe, run: Callable[[Recipe], tuple[bool, Found]]) -> Found:
    """What `run` gives for the recipe at the strongest setting found that keeps a drop, or at the weakest tried.

    `run` tells whether a recipe's network keeps the drop, and what it is. The recipe itself comes first; settings that
    its stages do not take count as none that keep it.
    """
    name, at = setting(recipe), 1.0
    kept, lost, refused, tried = dict[float, Found](), dict[float, Found](), list[float](), list[Recipe]()
    for _ in progress(range(RUNS), f"tries of the {name}", RUNS):
        try:
            stages = stronger(recipe, at, name)
            if stages in tried:  # bits are whole numbers
                break
            keeps, found = run(stages)
        except ValueError:
            if not tried:
                raise
            refused.append(at)
        else:
            tried.append(stages)
            (kept if keeps else lost)[at] = found
            if keeps:
                best_so_far(-at, f"{name} {numbers(stages, name)[-1]:.4g}")
        worse = min([*lost, *refused], default=math.inf)
        if kept and worse < math.inf:
            at = math.sqrt(max(kept) * worse)
        else:
            at = max(kept) * STRONGER if kept else worse / STRONGER
    return kept[max(kept)] if kept else lost[min(lost)]


def _free(recipe: Recipe) -> Recipe:
    """The stages whose size is not settled by a step or a budget of their own, whatever methods they choose among."""
    return tuple(stage for stage in recipe if not hasattr(stage, "budget"))


def waits(stage: Stage) -> bool:
    """Whether a stage waits for a budget."""
    return hasattr(stage, "budget") and stage.budget is None and getattr(stage, "c", None) is None


def numbers(value: Any, name: str) -> list[float]:
    """The numbers in fields of this name, wherever they are in a value."""
    if isinstance(value, tuple | list):
        return [found for part in value for found in numbers(part, name)]
    if not is_dataclass(value) or isinstance(value, type):
        return []
    own = [getattr(value, f.name) for f in fields(value) if f.name == name]
    below = [found for f in fields(value) for found in numbers(getattr(value, f.name), name)]
    return [v for v in own if isinstance(v, int | float)] + below


def _changed(value: Any, change: Callable[[str, Any], Any]) -> Any:
    """The value with `change(field, value)` in place of every field of every dataclass in it."""
    if isinstance(value, tuple | list):
        return type(value)(_changed(part, change) for part in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    held = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    made = {n: change(n, _changed(v, change)) for n, v in held.items()}
    return replace(value, **{n: v for n, v in made.items() if v is not held[n]})


def _power(value: Any, e: float, name: str) -> Any:
    if e == 1:
        return value
    if name == "scale":
        return value / e
    if name == "bits":
        return min(12, max(2, round(value / e)))
    return min(1.0, max(1e-6, value**e))
