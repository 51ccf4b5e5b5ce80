"""Recurrent layers and cells as the linear layers of their gates, so that these can be watched."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Linear: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
CELLS = {f"{kind}_cell": kind for kind in KINDS}


def recurrent(linear: Linear, name: str, args: Any, given: Mapping[str, Any]) -> Any:
    """What torch's function of this name returns, all its products being calls of `linear`(input, weight, bias)."""
    kind = CELLS.get(name, name)
    if name in CELLS:
        all_given: list[Any] = [*args, *given.values(), None, None]
        x, hx, first, second, *biases = all_given
        state = hx if isinstance(hx, tuple | list) else (hx,)
        ended = _step(linear, kind, linear(x, first, biases[0]), state, second, biases[1])
        return ended if kind == "lstm" else ended[0]
    packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    if packed:
        x, sizes, hx, weights, biased, layers, _, _, both = args
        lengths, first = sizes.tolist(), False
    else:
        x, hx, weights, biased, layers, _, _, both, first = args
        x = x.transpose(0, 1) if first else x
        lengths = [x.shape[1]] * len(x)
        x = x.flatten(0, 1)
    start = hx if isinstance(hx, tuple | list) else (hx,)
    directions, per = 2 if both else 1, len(weights) // (layers * (2 if both else 1))
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        found = []
        for direction in range(directions):
            k = layer * directions + direction
            own = weights[k * per : (k + 1) * per]
            added = (own[2], own[3]) if biased else (None, None)
            project = own[-1] if per in (3, 5) else None
            begin = tuple(part[k] for part in start)
            outs, end = _run(linear, kind, x, lengths, begin, own, added, project, direction == 1)
            found.append(outs)
            ends.append(end)
        x = torch.cat(found, -1)
    final = tuple(torch.stack(part) for part in zip(*ends, strict=True))
    if not packed:
        x = x.unflatten(0, (len(lengths), lengths[0]))
        x = x.transpose(0, 1) if first else x
    return (x, *final)


def _run(
    linear: Linear, kind: str, x: Tensor, lengths: list[int], begin: tuple[Tensor, ...], own: Sequence[Tensor],
    biases: tuple[Tensor | None, Tensor | None], project: Tensor | None, backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """One direction of one layer over packed rows: the outputs, packed alike, and the last state."""
    moved = torch.split(linear(x, own[0], biases[0]), lengths)
    state, outs, done = tuple(part[: lengths[-1] if backwards else lengths[0]] for part in begin), [], []
    for t in reversed(range(len(lengths))) if backwards else range(len(lengths)):
        size = lengths[t]
        if size < len(state[0]):  # sequences that have ended
            done.append(tuple(part[size:] for part in state))
            state = tuple(part[:size] for part in state)
        elif size > len(state[0]):  # sequences that begin here, read from their end
            state = tuple(torch.cat([part, new[len(part) : size]]) for part, new in zip(state, begin, strict=True))
        state = _step(linear, kind, moved[t], state, own[1], biases[1])
        if project is not None:
            state = (linear(state[0], project, None), *state[1:])
        outs.append(state[0])
    ended = [state, *reversed(done)]
    final = tuple(torch.cat(part) for part in zip(*ended, strict=True))
    return torch.cat(outs[::-1] if backwards else outs), final


def _step(
    linear: Linear, kind: str, x: Tensor, state: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    h, moved = state[0], linear(state[0], weight, bias)
    if kind == "lstm":
        i, f, g, o = (x + moved).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "gru":
        (r, z, n), (hr, hz, hn) = x.chunk(3, -1), moved.chunk(3, -1)
        z, n = (z + hz).sigmoid(), (n + (r + hr).sigmoid() * hn).tanh()
        return (n + z * (h - n),)
    return ((x + moved).tanh() if kind == "rnn_tanh" else (x + moved).relu(),)
