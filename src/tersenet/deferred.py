"""Trees that are made when they are read, so that a network need not lie in memory as a whole."""

import weakref
from collections.abc import Callable
from typing import Any

from tersenet.packed import Tree


class Deferred:
    """A tree that `make` gives when it is asked for, and that is kept while someone holds it; its shape is known."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], Tree]) -> None:
        self.shape, self._make = shape, make
        self._held: Callable[[], Tree | None] = lambda: None

    def tree(self) -> Tree:
        tree = self._held()
        if tree is None:
            tree = self._make()
            self._held = weakref.ref(tree)
        return tree


class MadeWhenRead:
    """A dataclass's field whose value may be given as `Deferred`: who reads the field finds the tree."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, holder: Any, owner: type | None = None) -> Tree:
        if holder is None:
            raise AttributeError(self._name)  # so that the field has no default
        held = vars(holder)[self._name]
        return held.tree() if isinstance(held, Deferred) else held

    def __set__(self, holder: Any, value: Any) -> None:
        vars(holder)[self._name] = value
