"""What a run would do to which tensor and why, with a rough estimate of its bytes; nothing is packed or trained."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tersenet.artifact import printable
from tersenet.budget import Budget
from tersenet.contract import PACKED, check
from tersenet.draft import KEPT_BY_RULE, Draft
from tersenet.methods import Method
from tersenet.packed import Array
from tersenet.promise import prepared
from tersenet.run import Recipe, Stage
from tersenet.strength import numbers, with_budget
from tersenet.task import Task
from tersenet.where import Where, chosen, chosen_with_vectors, kinds

LEARNED = 4.0  # bits a weight where only a run can tell: most networks end at 3 to 5
HEADER = 40  # bytes of a file, and about those of a tensor, beside its values
WIDTHS = {"float64": 64, "int64": 64, "uint64": 64, "float32": 32, "int32": 32, "uint32": 32, "bool": 8}
NARROW = {"float16": 16, "bfloat16": 16, "int16": 16, "uint16": 16}


@dataclass(frozen=True)
class Line:
    """One tensor: how many values, by which rule, what stages do to it, `bits` a value of which `density` is stored."""

    name: str
    kind: str
    weights: int
    bits: float
    rule: str = ""
    does: tuple[str, ...] = ()
    density: float = 1.0
    settled: bool = False  # a rule or the recipe leaves it, or packed it, whatever the budget

    @property
    def bytes(self) -> float:
        d = self.density
        places = 0.0 if d in (0, 1) else -d * math.log2(d) - (1 - d) * math.log2(1 - d)
        return self.weights * (d * self.bits + places) / 8 + HEADER


@dataclass(frozen=True)
class Plan:
    """The lines of a run, and the most bytes that it may end at; None where the metric decides or nothing does."""

    lines: tuple[Line, ...]
    stages: tuple[str, ...]
    most: int | None
    drop: float | None = None

    @property
    def bytes(self) -> list[int]:
        """The estimate for each line. To a budget, what may give way is scaled, to no more than it is as it stands."""
        settled = sum(line.bytes for line in self.lines if line.settled)
        free = sum(line.bytes for line in self.lines if not line.settled)
        part = 1.0 if self.most is None or not free else max(0.0, self.most - settled - HEADER) / free
        return [round(n.bytes if n.settled else min(part * n.bytes, 4 * n.weights + HEADER)) for n in self.lines]

    def __str__(self) -> str:
        sizes, wide = self.bytes, max(20, *(len(line.name) for line in self.lines))
        text = [f"the recipe: {', then '.join(self.stages)}"]
        text.append(f"{'tensor':<{wide}} {'kind':<16} {'weights':>12} {'~bytes':>12}  what is done")
        for line, size in zip(self.lines, sizes):
            done = "; ".join(line.does) + (f" (by the rule {line.rule!r})" if line.rule else "")
            text.append(f"{printable(line.name):<{wide}} {line.kind:<16} {line.weights:>12,} {size:>12,}  {done}")
        text.append(f"about {sum(sizes) + HEADER:,} bytes; a rough estimate, since nothing was packed{self._why()}")
        return "\n".join(text)

    def _why(self) -> str:
        if self.drop is not None:
            return f"; {LEARNED:g} bits a weight are assumed, a drop of {self.drop:g} points decides"
        if self.most is None:
            return ""
        kept = sum(line.bytes for line in self.lines if line.settled)
        short = "; what is settled leaves no room for the rest" if kept + HEADER > self.most else ""
        return f"; the budget allows {self.most:,}{short}"


def plan(
    source: Task | Mapping[str, Array],
    recipe: Recipe | None = None,
    budget: Budget | None = None,
    *,
    keep: Iterable[Where | str] = (),
    rules: Sequence[tuple[Where | str, Method]] = (),
) -> Plan:
    """What `compress` with the same arguments would do; raises ValueError where it would refuse before any work."""
    draft, recipe, budget = prepared(source, recipe, budget, keep=keep, rules=rules)
    most = None if budget is None else budget.bytes_for(draft.count())
    if budget is not None:
        recipe = with_budget(recipe, budget, None) or recipe
    check(recipe, draft, source if isinstance(source, Task) else None)
    lines = _begun(draft)
    for number, stage in enumerate(recipe):
        lines = _after(stage, draft, lines, before=bool(rules) and number == 0)
    named = tuple(type(stage).__name__ for stage in recipe)
    return Plan(tuple(lines.values()), named, most, None if budget is None else budget.drop)


def _begun(draft: Draft) -> dict[str, Line]:
    """Every tensor as it stands, tied ones with the first of them."""
    lines, seen, kind = dict[str, Line](), dict[int, str](), kinds(draft)
    for name, tensor in draft.tensors.items():
        size = math.prod(tensor.tree.shape)
        bits = WIDTHS.get(tensor.dtype, NARROW.get(tensor.dtype, 8))
        why = "stays" if name in draft.trainable else tensor.note.removeprefix("dense: ")
        rule = draft.left.get(name, "")
        if id(tensor) in seen:
            lines[name] = Line(name, kind[name], 0, 0, rule, (f"tied to {seen[id(tensor)]}",), settled=True)
            continue
        seen[id(tensor)] = name
        told = "kept" if tensor.note == KEPT_BY_RULE else why
        lines[name] = Line(name, kind[name], size, bits, rule, (told,), settled=True)
    return lines


def _after(stage: Stage, draft: Draft, lines: Mapping[str, Line], before: bool) -> dict[str, Line]:
    """The lines after a stage; what one `before` the recipe packs is settled."""
    name, changed = type(stage).__name__, dict(lines)
    weights = [n for n in draft.weights() if not any(done.startswith("packed") for done in lines[n].does)]
    if name == "Narrow":
        for n in draft.trainable & lines.keys():
            if lines[n].bits == 32 and lines[n].weights:
                changed[n] = _does(lines[n], f"rounded to {getattr(stage, 'dtype', 'half')} by Narrow", bits=16)
    elif hasattr(stage, "method"):  # Pack and Layerwise
        ruled = chosen_with_vectors(draft, getattr(stage, "rules", ()))
        for n in [*weights, *(ruled.keys() - draft.weights())]:
            rule, method = ruled.get(n, ("", stage.method))
            if method is not None:
                left = {part: min([getattr(lines[n], part), *numbers(method, part)]) for part in ("bits", "density")}
                changed[n] = _does(lines[n], f"packed by {name} with {method}", rule, settled=before, **left)
            elif rule:
                changed[n] = _does(lines[n], f"left out by {name}", rule)
    elif (part := getattr(stage, "density", None) or getattr(stage, "macs", None)) is not None:
        ruled = chosen(draft, getattr(stage, "rules", ()))
        for n in weights:
            rule, density = ruled.get(n, ("", part))
            changed[n] = _does(lines[n], f"thinned by {name}", rule, density=density, settled=False)
    elif set(getattr(stage, "makes", ())) & set(PACKED):
        for n in weights:
            many = len(getattr(stage, "methods", ()))
            how = f", as is or by one of {many} methods" if many else ""
            bits = min(LEARNED, lines[n].bits)
            changed[n] = _does(lines[n], f"packed by {name}{how}", bits=bits, settled=False)
    return changed


def _does(line: Line, what: str, rule: str = "", **changes: Any) -> Line:
    did = () if line.does == ("stays",) else line.does
    return replace(line, does=(*did, what), rule=rule or line.rule, **changes)
