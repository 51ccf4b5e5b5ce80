"""Modules of torch that run on packed weights: what `Artifact.attach` puts in place of a network's layers.

Their weights are buffers, so that they are printed, copied, saved and sent as any module's. They run forward only, on
the CPU in float32. Under torch.compile and torch.export products are the custom operators `tersenet::product` and
`tersenet::convolution`.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional

from tersenet import cores
from tersenet.packed import Array, Codebook, Uniform, unpack
from tersenet.runtime import kernels
from tersenet.runtime.convolution import Side, convolved
from tersenet.runtime.forms import FORMS, Form, SparseRows

SIGNED = {"uint16": "int16", "uint32": "int32"}  # what stands in for types that torch cannot pickle
ELSEWHERE = (torch.float16, torch.bfloat16, torch.float64)  # of floats


def taken_apart(form: Form) -> tuple[list[Array], Any]:
    """The arrays of a form, and its class and numbers with the types of the arrays in their places."""
    arrays, parts = list[Array](), dict[str, Any]()

    def told(value: Any) -> Any:
        if isinstance(value, Form):
            own, below = taken_apart(value)
            arrays.extend(own)
            return {"form": below, "arrays": len(own)}
        if isinstance(value, np.ndarray):
            arrays.append(value)
            return {"dtype": str(value.dtype)}
        return [told(part) for part in value] if isinstance(value, tuple) else value

    for field in fields(form):
        parts[field.name] = told(getattr(form, field.name))
    return arrays, [type(form).__name__, parts]


def put_together(arrays: list[Array], spec: Any) -> Form:
    """The form of which `taken_apart` told."""
    left = list(reversed(arrays))

    def made(value: Any) -> Any:
        if isinstance(value, dict) and "dtype" in value:
            return left.pop().view(value["dtype"])
        if isinstance(value, dict):
            return put_together([left.pop() for _ in range(value["arrays"])], value["form"])
        return tuple(map(made, value)) if isinstance(value, list) else value

    name, parts = spec
    return FORMS[name](**{key: made(value) for key, value in parts.items()})


def threads() -> int:
    """How many threads a product may have."""
    return max(1, min(torch.get_num_threads(), cores.usable()))


def _form(parts: list[Tensor], spec: str) -> Form:
    return put_together([part.numpy() for part in parts], json.loads(spec))


def _multiplied(x: Tensor, form: Form) -> Tensor:
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()
    return torch.from_numpy(form.product(rows, threads()))


@torch.library.custom_op("tersenet::product", mutates_args=())
def product(x: Tensor, parts: list[Tensor], spec: str, rows: int) -> Tensor:
    """x W^T of a packed weight."""
    return _multiplied(x, _form(parts, spec)).reshape(*x.shape[:-1], rows)


@product.register_fake
def _(x: Tensor, parts: list[Tensor], spec: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


class PackedWeight(nn.Module):
    """A weight in executable form, as buffers, and what was said when the form was chosen."""

    def __init__(self, form: Form, why: str, rows: int, columns: int) -> None:
        super().__init__()
        arrays, spec = taken_apart(form)
        self.rows, self.columns, self.why, self.spec = rows, columns, why, json.dumps(spec)
        self._made: tuple[list[int], Any] = [], None
        for k, array in enumerate(arrays):
            held = np.require(array, requirements=["C", "W"]).view(SIGNED.get(str(array.dtype), array.dtype))
            self.register_buffer(f"part{k}", torch.from_numpy(held))

    def parts(self) -> list[Tensor]:
        """The arrays of the form, as they must be."""
        found: Any = list(self._buffers.values())
        if any(part.device.type != "cpu" or part.dtype in ELSEWHERE for part in found):
            raise RuntimeError("a packed weight runs on the CPU in float32; use Artifact.into for a module that moves")
        return found  # type: ignore[no-any-return]

    def form(self) -> Form:
        """The form, which is put together once for the buffers that lie where they lie."""
        parts = self.parts()
        where = [part.data_ptr() for part in parts]
        if where != self._made[0]:
            self._made = where, _form(parts, self.spec)
        form: Form = self._made[1]
        return form

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": ([], None)}

    def forward(self, x: Tensor) -> Tensor:
        """x W^T for [..., columns]."""
        if x.shape[-1] != self.columns or x.dtype != torch.float32:
            raise ValueError(f"a packed weight takes float32 [..., {self.columns}], not {x.dtype} {list(x.shape)}")
        if by_operator(x):
            return product(x, self.parts(), self.spec, self.rows)  # type: ignore[no-any-return]
        return _multiplied(x, self.form()).reshape(*x.shape[:-1], self.rows)

    def extra_repr(self) -> str:
        return self.why


def by_operator(x: Tensor) -> bool:
    """Whether a product goes through torch's dispatcher: where it is traced, or a gradient would be asked of it.

    Raises RuntimeError for an input with a tangent, which would be lost.
    """
    traced: bool = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not traced and unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError("packed weights have no derivatives; differentiate what artifact.into(model) gives")
    return traced or type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled())


class PackedLinear(nn.Module):
    """A linear layer of a packed weight."""

    def __init__(self, layer: nn.Linear, weight: PackedWeight) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed, self.bias = weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.packed(input)
        return y if self.bias is None else y + self.bias


class PackedConv2d(nn.Module):
    """A convolution of a sparse weight: each number times the whole image, which lies padded and by strides."""

    def __init__(self, layer: nn.Conv2d, weight: PackedWeight) -> None:
        super().__init__()
        self.packed, self.bias = weight, layer.bias
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        if not isinstance(layer.padding, str):
            top = bottom = layer.padding[0]
            left = right = layer.padding[1]
        self.geometry = [*layer.kernel_size, *layer.stride, *layer.dilation, top, bottom, left, right]

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels or input.dtype != torch.float32:
            raise ValueError(
                f"this takes float32 images of {self.in_channels} channels, not {input.dtype} {list(input.shape)}"
            )
        images = input if input.dim() == 4 else input[None]
        if by_operator(input):
            y: Tensor = convolution(images, self.packed.parts(), self.packed.spec, self.geometry)
        else:
            y = _convolved(images, self.packed.form(), self.geometry)
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        return y if input.dim() == 4 else y[0]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"


def _convolved(x: Tensor, form: Form, geometry: list[int]) -> Tensor:
    assert isinstance(form, SparseRows)
    image = x.detach().numpy()
    return torch.from_numpy(convolved(form, image, _sides(geometry), threads()))


def _sides(geometry: list[int]) -> tuple[Side, Side]:
    kernel, stride, dilation, pads = geometry[:2], geometry[2:4], geometry[4:6], (geometry[6:8], geometry[8:])
    return tuple(Side(k, s, d, *p) for k, s, d, p in zip(kernel, stride, dilation, pads))  # type: ignore[return-value]


@torch.library.custom_op("tersenet::convolution", mutates_args=())
def convolution(x: Tensor, parts: list[Tensor], spec: str, geometry: list[int]) -> Tensor:
    """A convolution [n, channels, height, width] with a sparse weight, without a bias."""
    return _convolved(x, _form(parts, spec), geometry)


@convolution.register_fake
def _(x: Tensor, parts: list[Tensor], spec: str, geometry: list[int]) -> Tensor:
    height, width = (side.positions(n) for side, n in zip(_sides(geometry), x.shape[2:]))
    return x.new_empty(x.shape[0], parts[2].shape[0] - 1, height, width)


class PackedEmbedding(nn.Module):
    """Rows of levels, or of numbers of codewords, that become floats when they are looked up."""

    def __init__(self, layer: nn.Embedding, tree: Uniform | Codebook, why: str) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.why = layer.num_embeddings, layer.embedding_dim, why
        book = factor = offset = scale = None
        if isinstance(tree, Codebook):
            rows, book = np.asarray(tree.index), np.asarray(unpack(tree.codewords), np.float32)
        else:
            found = kernels.scales(tree)
            assert found is not None
            rows, (scale, offset, factor) = np.asarray(tree.q), found
        self.offset = offset if isinstance(offset, int) else 0
        several = None if isinstance(offset, int) else offset
        for name, part in (
            ("rows", rows), ("book", book), ("scale", scale), ("offsets", several), ("factor", factor)
        ):  # fmt: skip
            held = None if part is None else torch.from_numpy(np.array(part))
            self.register_buffer(name, held)

    rows: Tensor
    book: Tensor | None
    scale: Tensor
    offsets: Tensor | None
    factor: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        rows = functional.embedding(input, self.rows)  # refuses what is no number of a row, where [] takes -1 and masks
        if self.book is not None:
            return self.book[rows.long()].reshape(*input.shape, self.embedding_dim)
        groups = self.scale.shape[1]
        levels = rows.float().reshape(*input.shape, groups, self.embedding_dim // groups) + self.offset
        if self.offsets is not None:
            levels = levels + self.offsets[input][..., None]
        found: Tensor = (levels * self.scale[input][..., None]).flatten(-2)
        return found if self.factor is None else found * self.factor

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.why}"


class PackedRecurrent(nn.Module):
    """An LSTM or GRU whose matrices are packed; inputs are padded tensors."""

    def __init__(self, layer: nn.LSTM | nn.GRU, weights: Mapping[str, PackedWeight]) -> None:
        super().__init__()
        self.gates = 4 if isinstance(layer, nn.LSTM) else 3
        self.hidden_size, self.num_layers = layer.hidden_size, layer.num_layers
        self.batch_first, self.bidirectional = layer.batch_first, layer.bidirectional
        for name, weight in weights.items():
            setattr(self, name, weight)
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            if name.startswith("bias"):
                self.register_parameter(name, parameter)

    def flatten_parameters(self) -> None:
        """Nothing to do, for those who call it of any recurrent layer."""

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        x, state = input, hx
        if not isinstance(x, Tensor):
            raise TypeError("a packed recurrent layer takes padded tensors, no PackedSequence")
        if x.dim() not in (2, 3):
            raise ValueError(f"a packed recurrent layer takes inputs of 2 or 3 axes, not {list(x.shape)}")
        single = x.dim() == 2
        steps = x[:, None] if single else x.transpose(0, 1) if self.batch_first else x
        ways = 2 if self.bidirectional else 1
        shape = (self.num_layers * ways, steps.shape[1], self.hidden_size)
        given = (state if self.gates == 4 else (state,)) if state is not None else ()
        wanted = (shape[0], self.hidden_size) if single else shape
        for part in given:
            if part.shape != wanted:
                raise ValueError(f"a packed recurrent layer takes states {list(wanted)}, not {list(part.shape)}")
        begun = [part.reshape(shape) for part in given] or [x.new_zeros(shape)] * (2 if self.gates == 4 else 1)
        ends: list[list[Tensor]] = []
        for layer in range(self.num_layers):
            found = []
            for way in range(ways):
                at = layer * ways + way
                y, end = self._run(
                    steps, [part[at] for part in begun], f"l{layer}{'_reverse' if way else ''}", way == 1
                )
                found.append(y)
                ends.append(end)
            steps = torch.cat(found, -1)
        last = [torch.stack(part) for part in zip(*ends)]
        if single:
            steps, last = steps[:, 0], [part[:, 0] for part in last]
        elif self.batch_first:
            steps = steps.transpose(0, 1)
        return steps, tuple(last) if self.gates == 4 else last[0]

    def _run(self, x: Tensor, state: list[Tensor], name: str, backwards: bool) -> tuple[Tensor, list[Tensor]]:
        """One layer in one direction: its outputs [steps, batch, hidden] and its last state."""

        def biased(kind: str, y: Tensor) -> Tensor:
            bias = getattr(self, f"bias_{kind}_{name}", None)
            return y if bias is None else y + bias

        inputs = biased("ih", getattr(self, f"weight_ih_{name}")(x))
        recurrent = getattr(self, f"weight_hh_{name}")
        found: list[Tensor] = []  # as torch.compile can read it
        for t in range(len(x) - 1, -1, -1) if backwards else range(len(x)):
            own, past = inputs[t].chunk(self.gates, -1), biased("hh", recurrent(state[0])).chunk(self.gates, -1)
            if self.gates == 4:
                i, f, g, o = (a + b for a, b in zip(own, past))
                cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
                state = [o.sigmoid() * cell.tanh(), cell]
            else:
                r, z = (a + b for a, b in zip(own[:2], past[:2]))
                new, z = (own[2] + r.sigmoid() * past[2]).tanh(), z.sigmoid()
                state = [(1 - z) * new + z * state[0]]
            found.append(state[0])
        return torch.stack(found[::-1] if backwards else found), state
