"""Norms whose scale went into the layer before them: their statistics are constants, which training must not touch.

`folding.py` folds them and marks them by the note `FOLDED`, which travels through the file. In a module they are
of a subclass that stays in evaluation form, so that training on does not normalise again.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from tersenet.container import Tensor

FOLDED = "folded: its scale went into the layer before it"
_MADE: dict[Any, Any] = {}


class Folded(nn.Module):
    """What a folded norm's class has beside its own: no training form."""

    def train(self, mode: bool = True) -> "Folded":
        return super().train(False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__bases__[1],), self.__dict__


def folded_norms(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of the norms that are folded, as the notes of their tensors say."""
    return frozenset(name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.note == FOLDED)


def hold(module: nn.Module, names: Collection[str]) -> None:
    """Make the named layers of a module `Folded`, and no others."""
    for name, layer in module.named_modules():
        held = isinstance(layer, Folded)
        if held != (name in names):
            layer.__class__ = type(layer).__bases__[1] if held else _folded(type(layer))
            layer.train(layer.training)


def _folded(kind: Any) -> Any:
    """The folded class of a norm's class, the same one at every call."""
    if kind not in _MADE:
        _MADE[kind] = type(f"Folded{kind.__name__}", (Folded, kind), {"__module__": __name__})
    return _MADE[kind]


def _blank(kind: type[nn.Module]) -> nn.Module:
    """An empty layer of a folded class, for pickle to fill."""
    made = _folded(kind)
    blank: nn.Module = made.__new__(made)
    return blank
