"""BatchNorm folded into the layer before it, layer by layer, where that changes nothing but rounding.

A norm in evaluation form is y = s x + t with s = gamma / sqrt(var + eps). Its scale goes into the rows of the layer
whose result it takes, what remains is a shift. Which result feeds which norm is seen in the operations of a forward
pass: nobody else may read the result, and both are used once. Each fold is then checked by itself at the norm's output.

A norm that is folded has the weight 1, the mean 0 and the variance 1 - eps, and the note `FOLDED` (`norms.py`). The
weight that took its scale is the nearest before it, in the order of the tensors, that has as many rows and is not
taken yet; where it is another one, or of a transposed convolution, `Draft.folded` and the file's notes say which.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tersenet.artifact import FLOATS, Artifact, Tensor
from tersenet.draft import Draft
from tersenet.norms import FOLDED, folded_norms
from tersenet.packed import Packed, Tree, Uniform, unpack
from tersenet.structure import is_plain, refilled
from tersenet.task import Task, one_thread
from tersenet.tracing.feeding import STATISTICS, Pair, Reads

__all__ = ["feeders", "folded", "folded_norms", "refolded", "untied"]

BATCHES = 4  # of calibration inputs, on which it is seen who reads what
ROUNDS = 8  # in each of which one fold is given up
HUGE = 1e6  # scales beyond it are left alone


def folded(draft: Draft, task: Task, batches: Sequence[Any]) -> tuple[Draft, dict[str, str]]:
    """The draft with norms folded where outputs stay the same on batches of inputs.

    Also tells, for the weight of each norm that is folded now or was before, the name of the shift that is added to its
    results; one that is a buffer, as in norms without weights behind layers without biases, is left out.
    """
    if draft.model is None or not batches:
        return draft, {}
    with one_thread():
        seen = Reads.of(task, draft.module(), batches[:BATCHES])
        done = folded_norms(draft.tensors)
        before = [pair for pair in seen.pairs() if pair.norm in done]
        pairs = [pair for pair in seen.pairs() if pair.norm not in done and _foldable(draft, pair)]
        after, pairs = _exact(draft, task, batches[:BATCHES], seen, pairs)
    shifts = {pair.weight: _shift(after.tensors, pair) for pair in (*before, *pairs)}
    return after, {weight: shift for weight, shift in shifts.items() if not shift.endswith("running_mean")}


def feeders(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, str]:
    """The weight that took the scale of each folded norm; `meta` are a file's notes, or {"folded": Draft.folded}."""
    return {norm: pair.weight for norm, pair in _pairs(tensors, meta.get("folded", {})).items()}


def refolded(original: Mapping[str, Tensor], draft: Draft | Artifact) -> dict[str, Tensor]:
    """The original tensors folded as a draft or file is, so that errors compare like with like."""
    told = draft.folded if isinstance(draft, Draft) else draft.meta.get("folded", {})
    changed = dict(original)
    for pair in _pairs(draft.tensors, told).values():
        if {pair.weight, f"{pair.norm}.running_mean", f"{pair.norm}.running_var"} <= original.keys():
            for name, values in (_moved(original, pair) | _constants(original, pair)).items():
                changed[name] = replace(original[name], tree=_in_type(values, original[name].dtype))
    return changed


def untied(draft: Draft) -> Draft:
    """The draft with the constants of folded norms stored apart, for stages that change some of them."""
    made = dict(draft.tensors)
    for norm, weight in feeders(draft.tensors, {"folded": draft.folded}).items():
        for name in (*(f"{norm}.{part}" for part in ("weight", "running_mean", "running_var")), Pair("", weight).bias):
            if name in made:
                made[name] = replace(made[name])
    return replace(draft, tensors=made)


def _exact(
    draft: Draft, task: Task, batches: Sequence[Any], seen: Reads, pairs: list[Pair]
) -> tuple[Draft, list[Pair]]:
    """The draft with those of the pairs folded that keep the outputs of their norms, checked in the norms' order."""
    for turn in range(ROUNDS + 1):
        if not pairs:
            break
        after = _applied(draft, pairs)
        found = Reads.of(task, after.module(), batches)
        norms = [pair.norm for pair in pairs]
        off = next((k[0] for k, out in seen.outs.items() if k[0] in norms and not _same(out, found.outs.get(k))), None)
        if off is None and all(map(_same, seen.results, found.results)):
            return after, pairs
        if off is None:
            break
        at = norms.index(off)
        pairs = pairs[:at] + (pairs[at + 1 :] if turn + 1 < ROUNDS else [])
    return draft, []


def _foldable(draft: Draft, pair: Pair) -> bool:
    """Whether the pair's tensors are its own, the weight is not packed, and the scale is neither 0 nor huge."""
    known, counts = draft.tensors, Counter(map(id, draft.tensors.values()))
    if pair.weight not in draft.trainable or not {f"{pair.norm}.{part}" for part in STATISTICS} <= known.keys():
        return False
    names = [pair.weight, pair.bias, *(f"{pair.norm}.{part}" for part in ("weight", "bias", *STATISTICS))]
    own = [known[name] for name in names if name in known]
    if not draft.left.keys().isdisjoint(names):
        return False
    if any(counts[id(tensor)] > 1 or tensor.dtype not in FLOATS for tensor in own) or not is_plain(own[0].tree):
        return False
    if any(isinstance(tensor.tree, Packed) for tensor in own[1:]):
        return False
    scale, read = (_scale(known, replace(pair, eps=eps)) for eps in (pair.eps, _eps(np.float32(1 - pair.eps))))
    rows = own[0].tree.shape[1] * pair.groups if pair.groups else own[0].tree.shape[0]
    with np.errstate(all="ignore"):
        sound = np.isfinite(scale) & (scale != 0) & (np.abs(scale) < HUGE) & (np.abs(read / scale - 1) < 1e-5)
    if len(scale) != rows or not 0 <= pair.eps < 1 or not sound.all():
        return False
    moved = _moved(known, pair)
    return all(np.isfinite(_in_type(values, known[name].dtype)).all() for name, values in moved.items())


def _applied(draft: Draft, pairs: Sequence[Pair]) -> Draft:
    """The draft with these pairs folded; equal constants are stored once."""
    trees: dict[str, Tree] = {}
    marks: dict[str, str] = {}
    constants: list[str] = []
    for pair in pairs:
        for name, values in _moved(draft.tensors, pair).items():
            trees[name] = refilled(draft.tensors[name].tree, _in_type(values, draft.tensors[name].dtype))
        for name, values in _constants(draft.tensors, pair).items():
            # Equal levels take no bits, where floats would take all of theirs; zeros can be no step's.
            value = np.float32(values[0])
            level = np.full(len(values), value != 0, np.int8)
            trees[name] = Uniform(level, np.array(value or 1, np.float32))
            constants.append(name)
        constants += [name for name in (f"{pair.norm}.num_batches_tracked",) if name in draft.tensors]
        scaled = f"{pair.norm}.weight"
        marks[scaled if scaled in draft.tensors else f"{pair.norm}.running_var"] = FOLDED
    after = draft.with_trees(trees).with_notes(marks).tied(constants)
    truth = {pair.norm: pair for pair in (*_pairs(draft.tensors, draft.folded).values(), *pairs)}
    told = dict(draft.folded)
    while wrong := [pair for pair in truth.values() if not pair.like(_pairs(after.tensors, told).get(pair.norm))]:
        told |= {pair.norm: [pair.weight, pair.groups] for pair in wrong}
    return replace(after, folded=told)


def _pairs(known: Mapping[str, Tensor], told: Mapping[str, Sequence[Any]]) -> dict[str, Pair]:
    """The pairs that are folded: those that are told, and the nearest weights before the other norms."""
    found: dict[str, Pair] = {}
    names, taken = list(known), {str(weight) for weight, _ in told.values()}
    for norm in dict.fromkeys(name.rpartition(".")[0] for name in names if known[name].note == FOLDED):
        held = known.get(f"{norm}.running_var")
        if held is None:
            continue
        if norm in told:
            weight, groups = told[norm]
            if weight in known:
                found[norm] = Pair(norm, weight, int(groups), _eps(unpack(held.tree)))
            continue
        first = next(at for at, name in enumerate(names) if name.rpartition(".")[0] == norm)
        for name in reversed(names[:first]):
            shape = known[name].tree.shape
            if len(shape) > 1 and shape[0] == held.tree.shape[0] and known[name].dtype in FLOATS and name not in taken:
                found[norm] = Pair(norm, name, 0, _eps(unpack(held.tree)))
                taken.add(name)
                break
    return found


def _eps(variance: Any) -> float:
    """The eps of which a folded norm's variance is 1 - eps in float32: the shortest decimal that fits."""
    held = np.float32(np.asarray(variance).reshape(-1)[0])
    rest = 1 - float(held)
    return next((e for k in range(8) if np.float32(1 - (e := float(f"{rest:.{k}e}"))) == held), rest)


def _dense(known: Mapping[str, Tensor], name: str, otherwise: float) -> Any:
    """A tensor in float64, or a number where there is none of this name."""
    return np.asarray(unpack(known[name].tree)).astype(np.float64) if name in known else np.float64(otherwise)


def _scale(known: Mapping[str, Tensor], pair: Pair) -> Any:
    with np.errstate(all="ignore"):
        variance = _dense(known, f"{pair.norm}.running_var", 1)
        return _dense(known, f"{pair.norm}.weight", 1) / np.sqrt(variance + pair.eps)


def _shift(known: Mapping[str, Tensor], pair: Pair) -> str:
    """The name of what is added to the layer's results after folding: the running mean is subtracted."""
    return next((name for name in (f"{pair.norm}.bias", pair.bias) if name in known), f"{pair.norm}.running_mean")


def _moved(known: Mapping[str, Tensor], pair: Pair) -> dict[str, Any]:
    """The folded weight and shift, dense in float64."""
    scale, weight, shift = _scale(known, pair), _dense(known, pair.weight, 0), _shift(known, pair)
    with np.errstate(all="ignore"):
        mean = _dense(known, f"{pair.norm}.running_mean", 0) - _dense(known, pair.bias, 0)
        added = _dense(known, f"{pair.norm}.bias", 0) - mean * scale
        if pair.groups:
            parts = weight.reshape(pair.groups, -1, *weight.shape[1:])
            factors = scale.reshape(pair.groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
            whole = (parts * factors).reshape(weight.shape)
        else:
            whole = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return {pair.weight: whole, shift: -added if shift.endswith("running_mean") else added}


def _constants(known: Mapping[str, Tensor], pair: Pair) -> dict[str, Any]:
    """What else belongs to the pair, all values of each the same."""
    values = {f"{pair.norm}.weight": 1.0, f"{pair.norm}.running_mean": 0.0, f"{pair.norm}.running_var": 1 - pair.eps}
    values[pair.bias] = 0.0
    values.pop(_shift(known, pair), None)
    return {name: np.full(known[name].tree.shape, value) for name, value in values.items() if name in known}


def _in_type(values: Any, dtype: str) -> Any:
    """Values as a tensor of this type holds them: float64 as such, others as float32; infinite where too large."""
    with np.errstate(over="ignore"):
        single = values.astype(dtype if dtype in ("float16", "float64") else np.float32)
    return single if dtype == "float64" else single.astype(np.float32)


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether two results differ by no more than rounding, as seen from the largest of them."""
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()) or not bool(finite.any()):
        return bool(torch.equal(finite, other.isfinite()))
    a, b = one[finite].double(), other[finite].double()
    rounding = max(1e-6, torch.finfo(one.dtype).eps ** 0.5)
    return bool((a - b).abs().max() <= rounding * a.abs().max() + 1e-30)
