"""Which operation multiplies which weight with what, seen where the arithmetic happens.

While a `Watch` lasts, every linear layer, convolution, transposed convolution, embedding, matrix product and einsum
with a parameter leaves a `Use`: what was multiplied, what came out, and how the parameter lies as a matrix. Modules are
not looked at, so projections of attention, functional calls, views, tied weights and repeated calls are all seen.
Recurrent layers are taken apart into the linear layers of their gates.
"""

import bisect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersenet.tracing.recurrent import CELLS, KINDS, recurrent

CONVOLUTIONS = {f"conv{k}d": k for k in (1, 2, 3)}
TRANSPOSED = {f"conv_transpose{k}d": k for k in (1, 2, 3)}
PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm")


@dataclass(frozen=True)
class Form:
    """How a weight lies as matrices [groups, rows, n]: seen with shape `split`, its axes in the order `axes`.

    The first `lead` of these are groups and rows, the others columns, which end in the kernel where there is one.
    """

    split: tuple[int, ...]
    axes: tuple[int, ...]
    lead: int = 1
    groups: int = 1
    kernel: tuple[int, ...] = ()

    @staticmethod
    def plain(shape: Sequence[int]) -> "Form":
        """Rows are the first axis that has more than one place, or simply the first."""
        lead = next((k for k, n in enumerate(shape[:-1]) if n > 1), 0) + 1
        return Form(tuple(shape), tuple(range(len(shape))), lead, 1, tuple(shape[lead + 1 :]))

    @property
    def ordered(self) -> tuple[int, ...]:
        """The extents in the order `axes`."""
        return tuple(self.split[axis] for axis in self.axes)

    @property
    def rows(self) -> int:
        return math.prod(self.ordered[: self.lead]) // self.groups

    @property
    def columns(self) -> int:
        return math.prod(self.ordered[self.lead :])

    @property
    def straight(self) -> bool:
        """Whether the axes lie as they are in the weight."""
        return self.axes == tuple(range(len(self.axes)))

    def matrix(self, weight: Any) -> Any:
        """A weight, NumPy or torch, as matrices [groups, rows, n]."""
        seen = weight.reshape(self.split)
        seen = seen.permute(self.axes) if isinstance(seen, Tensor) else seen.transpose(self.axes)
        return seen.reshape(self.groups, self.rows, self.columns)


@dataclass
class Use:
    """One use of a weight: rows first to first + form.rows * form.groups of it, [.., n] inputs and [.., rows] results.

    `unrolled` turns the inputs into [groups, positions, n], `results` a gradient of `out` into [groups, positions,
    rows]. `pooled` says that the positions of a sample lie side by side in the axes behind the channels of `out`, as in
    convolutions. `tokens` are the rows that an embedding looked up.
    """

    name: str
    form: Form
    out: Tensor
    first: int = 0
    inputs: Tensor | None = None
    unrolled: Callable[[Tensor], Tensor] = lambda x: x
    results: Callable[[Tensor], Tensor] = lambda g: g
    pooled: bool = False
    bias: str | None = None
    tokens: Tensor | None = None


class Watch(TorchFunctionMode):
    """Records the uses of a module's parameters in `uses`, in the order of the calls, and keeps gradients flowing.

    Parameters of the module that lie otherwise in memory, as channels last, are laid in C order, but for views of
    others.
    """

    def __init__(self, model: nn.Module) -> None:
        self.uses: list[Use] = []
        held: dict[int, tuple[str, Tensor]] = {}
        named = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.numel()]
        plain = {p.data_ptr() for _, p in named if p.is_contiguous()}
        for name, parameter in named:
            if not parameter.is_contiguous() and parameter.data_ptr() not in plain:
                parameter.data = parameter.data.contiguous()
            if parameter.is_contiguous():
                held.setdefault(parameter.data_ptr(), (name, parameter))
        self.held = sorted(held.items())
        self.begins = [begin for begin, _ in self.held]

    def __torch_function__(
        self, func: Any, types_: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given, name = dict(kwargs or {}), getattr(func, "__name__", "")
        with torch.enable_grad():  # parts that a model runs without gradients have a price too
            if name == "multi_head_attention_forward":
                with self:
                    return _open(func)(*args, **given)
            if name in KINDS or name in CELLS:
                return recurrent(self._linear, name, args, given)
            out = func(*args, **given)
            if not isinstance(out, Tensor) or not out.is_floating_point():
                return out
            before = len(self.uses)
            if name == "linear":
                bound = arguments(name, args, given)
                self._product(bound["input"], bound["weight"], out, bound["bias"], transposed=True)
            elif name in CONVOLUTIONS or name in TRANSPOSED:
                self._convolution(name, args, given, out)
            elif name == "addmm" and not given:
                self._product(args[1], args[2], out, args[0])
            elif name in PRODUCTS:
                x, weight = (args[1], args[0]) if name == "__rmatmul__" else (args[0], [*args, *given.values()][1])
                self._product(x, weight, out)
            elif name == "einsum":
                self._einsum(args, out)
            elif name == "embedding":
                self._embedding(args, given, out)
            return (
                out.clone() if len(self.uses) > before else out
            )  # what changes it in place must not change the record

    def _parameter(self, weight: Any) -> tuple[str, Tensor, int] | None:
        """The parameter that a tensor is a view of, and by how many values the view begins behind it."""
        if not isinstance(weight, Tensor) or weight.layout != torch.strided or not weight.is_floating_point():
            return None
        begin = weight.data_ptr()
        at = bisect.bisect_right(self.begins, begin) - 1
        if at < 0 or not weight.numel():
            return None
        first, (name, parameter) = self.held[at]
        if begin >= first + parameter.nbytes or weight.dtype != parameter.dtype:
            return None
        return name, parameter, (begin - first) // parameter.itemsize

    def _bias(self, bias: Any, first: int, rows: int, whole: int) -> str | None:
        """The name of the bias, as long as the weight, whose places first to first + rows are added, if any."""
        found = self._parameter(bias)
        fits = found is not None and bias.numel() == rows and bias.is_contiguous() and found[2] == first
        return found[0] if found is not None and fits and found[1].numel() == whole else None

    def _product(self, x: Tensor, weight: Tensor, out: Tensor, bias: Any = None, transposed: bool = False) -> None:
        """x @ weight, or x @ weight^T as a linear layer has it; the parameter may be on either side."""
        left = not transposed and self._parameter(weight) is None
        if left:  # what is multiplied from the left are the columns of the other
            x, weight = (weight if weight.dim() > 1 else weight[:, None]).transpose(-1, -2), x
        found = self._parameter(weight)
        if found is None or weight.dim() != 2:
            return
        name, parameter, begin = found
        seen = weight if transposed or left else weight.t()  # [rows, n]
        rows, n = seen.shape
        first, whole = 0, rows
        if seen.numel() == parameter.numel() and seen.is_contiguous():
            form = Form((rows, n), (0, 1))
        elif seen.numel() == parameter.numel() and seen.t().is_contiguous():
            form = Form((n, rows), (1, 0))
        elif seen.is_contiguous() and n == parameter.shape[-1] and begin % n == 0:
            first, whole = begin // n, parameter.numel() // n
            form = Form((whole, n), (0, 1))
        else:
            return
        vector = left and out.dim() == 1

        def results(g: Tensor) -> Tensor:
            return (g.transpose(-1, -2) if left and not vector else g).reshape(1, -1, rows)

        def unrolled(x: Tensor) -> Tensor:
            return x.reshape(1, -1, n)

        added = self._bias(bias, first, rows, whole)
        self.uses.append(Use(name, form, out, first, x.detach(), unrolled, results, bias=added))

    def _convolution(self, name: str, args: Any, given: Any, out: Tensor) -> None:
        backwards = name in TRANSPOSED
        dims = TRANSPOSED[name] if backwards else CONVOLUTIONS[name]
        bound = arguments(name, args, given)
        x, weight, groups = bound["input"], bound["weight"], bound["groups"] or 1
        found = self._parameter(weight)
        if found is None or weight.numel() != found[1].numel() or not weight.is_contiguous():
            return  # a view of a part is left to the gradients of the whole
        stride, dilation = (_each(bound[key], dims, 1) for key in ("stride", "dilation"))
        shape, kernel = tuple(weight.shape), tuple(weight.shape[2:])
        if backwards:
            split = (groups, shape[0] // groups, *shape[1:])
            form = Form(split, (0, 2, 1, *range(3, dims + 3)), 2, groups, kernel)
            more = _each(bound["output_padding"], dims, 0)
            unrolled = _scattered(kernel, stride, _each(bound["padding"], dims, 0), more, dilation, groups)
        else:
            form = Form(shape, tuple(range(len(shape))), 1, groups, kernel)
            unrolled = _unfolded(kernel, stride, bound["padding"], dilation, groups)
        rows = form.rows * groups
        added = self._bias(bound["bias"], 0, rows, rows)
        batched = x.dim() == dims + 2
        x = x.detach() if batched else x.detach()[None]

        def results(g: Tensor) -> Tensor:
            g = g if batched else g[None]
            return g.reshape(len(g), groups, form.rows, -1).permute(1, 0, 3, 2)  # [groups, samples, positions, rows]

        self.uses.append(Use(found[0], form, out, 0, x, unrolled, results, True, added))

    def _einsum(self, args: Any, out: Tensor) -> None:
        equation = args[0]
        operands = list(args[1]) if len(args) == 2 and isinstance(args[1], list | tuple) else list(args[1:])
        if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
            return
        left, right = equation.replace(" ", "").split("->")
        terms = left.split(",")
        known = [self._parameter(operand) for operand in operands]
        if (known[0] is None) == (known[1] is None):
            return
        at = 0 if known[0] is not None else 1
        name, parameter, _ = known[at] or ("", out, 0)
        weight, x = operands[at], operands[1 - at].detach()
        own, other = terms[at], terms[1 - at]
        single = all(len(set(term)) == len(term) for term in (own, other, right))
        groups = [c for c in own if c in other and c in right]
        summed, rows = (
            [c for c in own if (c in there) and (c not in gone)] for there, gone in ((other, right), (right, other))
        )
        if not single or not weight.is_contiguous() or weight.numel() != parameter.numel() or not rows or not summed:
            return
        if len(groups) + len(summed) + len(rows) != len(own) or any(c not in own and c not in right for c in other):
            return
        extent = dict(zip(own, weight.shape, strict=True))
        m, n, g = (math.prod(extent[c] for c in part) for part in (rows, summed, groups))
        places = [c for c in other if c not in own]
        order = [own.index(c) for c in (*groups, *rows, *summed)]
        form = Form(tuple(weight.shape), tuple(order), len(groups) + len(rows), g)

        def unrolled(x: Tensor) -> Tensor:
            return x.permute([other.index(c) for c in (*groups, *places, *summed)]).reshape(g, -1, n)

        def results(gradient: Tensor) -> Tensor:
            return gradient.permute([right.index(c) for c in (*groups, *places, *rows)]).reshape(g, -1, m)

        self.uses.append(Use(name, form, out, 0, x, unrolled, results))

    def _embedding(self, args: Any, given: Any, out: Tensor) -> None:
        first, second = _bound(("input", "weight"), args, given)[:2]
        tokens, weight = (second, first) if first.is_floating_point() else (first, second)
        found = self._parameter(weight)
        if found is None or tuple(found[1].shape) != tuple(weight.shape):
            return
        form = Form(tuple(weight.shape), (0, 1))
        width = weight.shape[1]
        results: Callable[[Tensor], Tensor] = lambda g: g.reshape(1, -1, width)  # noqa: E731
        self.uses.append(Use(found[0], form, out, 0, results=results, tokens=tokens.detach().reshape(-1)))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.linear(x, weight, bias)
        self._product(x, weight, out, bias, transposed=True)
        return out


def _open(func: Any) -> Any:
    """A Python function of torch that does not hand itself to modes, so that one sees the operations in it."""
    seen = {**func.__globals__, "has_torch_function": lambda _: False}
    made = types.FunctionType(func.__code__, seen, func.__name__, func.__defaults__, func.__closure__)
    made.__kwdefaults__ = func.__kwdefaults__
    return made


def arguments(name: str, args: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a linear layer or a convolution was called with, by torch's names; None for what was not given."""
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if name in TRANSPOSED:
        names[5:] = ["output_padding", "groups", "dilation"]
    return dict(zip(names, _bound(names, args, given), strict=True))


def _bound(names: Sequence[str], args: Any, given: Mapping[str, Any]) -> list[Any]:
    return [args[k] if k < len(args) else given.get(name) for k, name in enumerate(names)]


def _each(value: Any, dims: int, otherwise: int) -> tuple[int, ...]:
    if value is None:
        value = otherwise
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _unfolded(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: Any, dilation: tuple[int, ...], groups: int
) -> Callable[[Tensor], Tensor]:
    """What each position of a convolution sees, [groups, samples * positions, n]."""
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if padding == "same":
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, len(kernel), 0)]

    def unrolled(x: Tensor) -> Tensor:
        if any(side != (0, 0) for side in sides):
            x = F.pad(x, [p for side in reversed(sides) for p in side])
        for axis, (span, step, d) in enumerate(zip(spans, stride, dilation, strict=True), 2):
            x = x.unfold(axis, span + 1, step)[..., ::d]
        x = x.reshape(len(x), groups, -1, *x.shape[2:])  # samples, groups, channels, positions..., kernel...
        dims = len(kernel)
        order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
        x = x.permute(order)
        return x.reshape(groups, math.prod(x.shape[1 : 2 + dims]), -1)

    return unrolled


def _scattered(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], more: tuple[int, ...],
    dilation: tuple[int, ...], groups: int,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """The same for a transposed convolution: each place of the kernel brings its own shifted copy of the input."""
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(kernel) - 1]
    taps = math.prod(kernel)

    def unrolled(x: Tensor) -> Tensor:
        channels = x.shape[1]
        single = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(1, taps, *kernel)
        u = transposed(x, single.expand(channels, -1, *kernel), None, stride, padding, more, channels, dilation)
        u = u.reshape(len(x), groups, channels // groups * taps, -1).permute(1, 0, 3, 2)
        return u.reshape(groups, -1, u.shape[-1])

    return unrolled
