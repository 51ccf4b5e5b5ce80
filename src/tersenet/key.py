"""A fingerprint of all that a result depends on: bytes of data, structure of objects, code of callables, versions.

Code counts as what it compiles to, with the defaults, the closure and the globals that it names; so comments, names of
files and the process do not matter. What Python, torch, NumPy and installed packages define counts by its name and
their version, all else by what it is. What cannot be looked into makes the whole `Uncacheable`.
"""

import builtins
import contextlib
import copyreg
import enum
import functools
import hashlib
import os
import sys
import textwrap
import types
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from tersenet.origins import files_of, globals_read, imported, installed, named, sources, spec_of, versions

FILES = 200_000  # under the folders that a task's data name, at most
TEXT = 1024  # characters of a path, at most
DATA = ("train", "test", "valid")  # attributes under which texts may be paths
CACHES = ("_iterator", "_flat_weight_refs", "_abc_impl")  # of a DataLoader, an RNN, a class: no result hangs on them
ATOMS = (type(None), bool, int, float, complex, str, bytes)
BUILTIN = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
# What some objects of Python and torch are made of.
PARTS: dict[type, Callable[[Any], Any]] = {
    types.MethodType: lambda thing: (thing.__func__, thing.__self__),
    property: lambda thing: (thing.fget, thing.fset, thing.fdel),
    staticmethod: lambda thing: thing.__func__,
    classmethod: lambda thing: thing.__func__,
    functools.cached_property: lambda thing: thing.func,
    functools._lru_cache_wrapper: lambda thing: thing.__wrapped__,
    weakref.ref: lambda thing: thing(),
    types.MappingProxyType: dict,
    torch.Generator: lambda thing: (str(thing.device), thing.get_state()),
    enum.Enum: lambda thing: (type(thing), thing.name),
}
METHODS = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)
MISSING = object()
HEAP = 1 << 9  # the flag of classes that are made at run time, as all of Python's are


class Uncacheable(Exception):
    """What a result depends on cannot all be seen; the message names it."""


def key_of(thing: Any, name: str = "task") -> str:
    """The fingerprint of a value, of tersenet's own sources and of the versions that it runs with: 64 hex digits.

    `name` is what messages call the value. Raises Uncacheable, naming what cannot be looked into. The order of a dict
    counts, that of a set does not; texts under `train`, `test` and `valid` that are paths count with the sizes and
    times of their files.
    """
    look = _Look()
    look.put(sources(), *versions().values(), str(torch.get_default_dtype()))
    look.feed(thing, (None, name), False)
    look.work()
    return look.mark.hexdigest()


At = tuple[Any, str]  # where a value was found: the place it hangs from (None for the first), and its own name there


def _told(at: At) -> str:
    parts, place = list[str](), at
    while place is not None:
        place, part = place
        parts.append(part)
    return "".join(reversed(parts))


class _Look:
    """What has been looked at, and what is still to be. Objects are numbered when they are first met, so cycles end."""

    def __init__(self) -> None:
        self.mark = hashlib.sha256()
        self.seen: dict[tuple[int, bool], tuple[int, Any]] = {}  # with the object, whose id is then no other's
        self.waiting: deque[tuple[Any, At, bool]] = deque()
        self.storages: dict[int, int] = {}
        self.versions: dict[str, str | None] = {}  # of packages
        self.modules = set[str]()
        self.paths, self.files = set[str](), 0

    def put(self, *parts: str | bytes) -> None:
        for part in parts:
            data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            self.mark.update(b"%d:" % len(data))
            self.mark.update(data)

    def feed(self, thing: Any, at: At, files: bool) -> None:
        """Take a value in: what holds others is only numbered here, and looked into when its turn comes."""
        kind = type(thing)
        if kind in ATOMS:
            self.put(kind.__name__, thing if kind is str or kind is bytes else repr(thing))
            if files and kind is str and os.path.basename(thing) not in ("", ".", ".."):
                self._files(thing, at)
        elif kind is tuple or kind is frozenset:  # equal constants may be one object or two, as the process has it
            self._members(thing, at, files)
        else:
            if (id(thing), files) not in self.seen:
                self.seen[id(thing), files] = len(self.seen), thing
                self.waiting.append((thing, at, files))
            self.put("object", str(self.seen[id(thing), files][0]))

    def work(self) -> None:
        """Look into all that waits."""
        while self.waiting:
            thing, at, files = self.waiting.popleft()
            try:
                self._content(thing, at, files)
            except Uncacheable:
                raise
            except Exception as wrong:  # whatever the code of a stranger's object raises
                raise _unseen(thing, at, wrong) from None

    # ------------------------------------------------------------ values

    def _content(self, thing: Any, at: At, files: bool) -> None:
        if isinstance(thing, torch.Tensor):
            self._tensor(thing, at, files)
        elif isinstance(thing, np.ndarray):
            self._array(thing, at, files)
        elif isinstance(thing, np.generic):
            self.put(thing.dtype.str, thing.tobytes())
        elif isinstance(thing, type):
            self._class(thing, at, files)
        elif isinstance(thing, types.FunctionType):
            self._function(thing, at, files)
        elif isinstance(thing, types.ModuleType):
            self._module(thing.__name__, at, files)
        elif isinstance(thing, BUILTIN):
            self._builtin(thing, at, files)
        elif isinstance(thing, tuple(PARTS)):
            parts = next(parts for kind, parts in PARTS.items() if isinstance(thing, kind))
            self.put(type(thing).__name__)
            self.feed(parts(thing), at, files)
        elif isinstance(thing, PurePath):
            self.put(type(thing).__name__, str(thing))
            if files:
                self._files(str(thing), at)
        elif isinstance(thing, dict | list | tuple | set | frozenset | deque | str | int | float | complex | bytes):
            self._container(thing, at, files)
        else:
            self._object(thing, at, files)

    def _container(self, thing: Any, at: At, files: bool) -> None:
        self.feed(type(thing), at, files)
        if isinstance(thing, dict):
            self.put(str(len(thing)))
            for key, value in thing.items():
                self.feed(key, (at, f" key {key!r}"), files)
                self.feed(value, (at, f"[{key!r}]"), files)
            self.feed(getattr(thing, "default_factory", None), (at, ".default_factory"), files)
        elif isinstance(thing, list | tuple | deque | set | frozenset):
            self._members(thing, at, files)
        else:  # a text or a number of a kind of its own
            plain = next(kind for kind in (str, int, float, complex, bytes) if isinstance(thing, kind))
            self.feed(plain(thing), at, files)
        if getattr(thing, "__dict__", None):
            self._attributes(thing, at, files)

    def _members(self, thing: Any, at: At, files: bool) -> None:
        some = isinstance(thing, set | frozenset)
        self.put("set" if some else "row", str(len(thing)))
        for k, value in enumerate(sorted(thing, key=_rank) if some else thing):
            self.feed(value, (at, f"[{k}]"), files)

    def _tensor(self, tensor: torch.Tensor, at: At, files: bool) -> None:
        held = tensor.detach()
        self.put("tensor", str(held.dtype), str(tuple(held.shape)), str(held.layout), str(tensor.requires_grad))
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            self.feed(type(tensor), at, files)
        self._attributes(tensor, at, files)
        if hasattr(tensor, "__tensor_flatten__"):
            names, more = tensor.__tensor_flatten__()
            self.feed(([getattr(tensor, name) for name in names], more), at, files)
        elif held.layout != torch.strided:
            sparse = held if held.layout == torch.sparse_coo else held.to_sparse_coo()  # type: ignore[no-untyped-call]
            self.feed((sparse._indices(), sparse._values(), sparse.is_coalesced()), at, files)
        elif held.is_quantized:
            self.feed((held.int_repr(), held.dequantize(), str(held.qscheme())), at, files)
        elif held.is_nested:
            raise TypeError("its parts are hidden")
        elif not held.is_meta and held.numel():
            storage = held.untyped_storage().data_ptr()  # tensors that share their numbers are tied
            place = self.storages.setdefault(storage, len(self.storages)), held.storage_offset(), held.stride()
            self.put(str(place))
            flat = held.cpu().resolve_conj().resolve_neg().contiguous().flatten()
            self.mark.update(flat.view(torch.uint8).numpy().data)

    def _array(self, array: Any, at: At, files: bool) -> None:
        self.put("array", str(array.dtype), str(array.shape), str(array.strides))
        if type(array) is not np.ndarray:
            self.feed(type(array), at, files)
            self._attributes(array, at, files)
        if array.dtype.hasobject:
            self.feed(array.tolist(), at, files)
        elif array.nbytes:
            flat = np.ascontiguousarray(array).view(np.ndarray).reshape(-1)
            self.mark.update(flat.view(np.uint8).data)

    # ------------------------------------------------------------ objects

    def _object(self, thing: Any, at: At, files: bool) -> None:
        kind = type(thing)
        self.feed(kind, at, files)
        module = isinstance(thing, nn.Module)
        own = any(getattr(kind, n) is not getattr(object, n) for n in ("__reduce__", "__reduce_ex__", "__getstate__"))
        if _all_in_python(kind) and (module or not own or self._version(kind.__module__) is None):
            self._attributes(thing, at, files)
        else:
            self._reduced(thing, at, files)
            if getattr(thing, "__dict__", None) and self._version(kind.__module__) is None:
                self._attributes(thing, at, files)

    def _attributes(self, thing: Any, at: At, files: bool) -> None:
        """What an object's `__dict__` and slots hold, by name."""
        held = dict(getattr(thing, "__dict__", {}))
        for slot in _slots(type(thing)) if type(thing).__flags__ & HEAP else ():
            with contextlib.suppress(AttributeError):  # an empty one
                held[slot.__name__] = slot.__get__(thing)
        if isinstance(thing, nn.Module):
            held |= _renumbered({n: v for n, v in held.items() if "_hooks" in n and isinstance(v, dict)})
        for name in sorted(held.keys() - set(CACHES)):
            data = files or (name in DATA and not isinstance(thing, nn.Module))
            self.put(name)
            self.feed(held[name], (at, f".{name}"), data)
            if data and isinstance(held[name], str):  # here "." is a folder, elsewhere a letter
                self._files(held[name], (at, f".{name}"))

    def _reduced(self, thing: Any, at: At, files: bool) -> None:
        """What pickle would keep of an object."""
        getattr(thing, "__dict__", None)  # some, as functools.partial, are kept otherwise once they were asked for it
        registered = copyreg.dispatch_table.get(type(thing))
        found = registered(thing) if registered else thing.__reduce_ex__(4)
        if isinstance(found, str):
            self.put("named", str(getattr(thing, "__module__", "")), found)
            return
        call, arguments, *rest = found
        state, items, pairs = (*rest, None, None, None)[:3]
        self.feed((call, arguments, state), at, files)
        self.feed((list(items or ()), list(pairs or ())), at, files)

    def _files(self, text: str, at: At) -> None:
        """Take in the files that a text names, if it is a path."""
        if not text or len(text) > TEXT or text in self.paths:
            return
        self.paths.add(text)
        found = files_of(text, FILES - self.files)
        if found is None:
            raise Uncacheable(f"{_told(at)}: more than {FILES:,} files lie under {text}")
        self.files += len(found)
        self.put("files", *found)

    # ------------------------------------------------------------ code

    def _function(self, function: types.FunctionType, at: At, files: bool) -> None:
        if name := self._known(function, function.__globals__.get("__name__")):
            self.put("function", name)
            return
        self.put("code")
        self._code(function.__code__, function.__globals__, at, files)
        self.feed((function.__defaults__, function.__kwdefaults__), (at, " default "), files)
        self._attributes(function, at, files)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            held: Any = MISSING
            with contextlib.suppress(ValueError):  # an empty one
                held = cell.cell_contents
            self.feed(held, (at, f" -> {name}"), files)

    def _code(self, code: types.CodeType, names: Mapping[str, Any], at: At, files: bool) -> None:
        self.put(code.co_code, getattr(code, "co_exceptiontable", b""))
        numbers = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        self.feed((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, numbers), at, False)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, names, at, files)
            else:
                self.feed(constant, (at, " constant"), files)
        for first, *rest in globals_read(code):
            self._named(first, rest, names, at, files)
        for module in imported(code, str(names.get("__package__") or "")):
            self._module(module, (at, f" -> {module}"), files)

    def _named(self, first: str, rest: list[str], names: Mapping[str, Any], at: At, files: bool) -> None:
        """What a global name of some code stands for; of a module, the attribute that the code takes."""
        if first not in names:
            self.put("builtin" if hasattr(builtins, first) else "missing", first)
            return
        value, at = names[first], (at, f" -> {first}")
        while isinstance(value, types.ModuleType) and rest:
            version = self._version(value.__name__)
            part, *rest = rest
            found, at = getattr(value, part, MISSING), (at, f".{part}")
            if found is MISSING or (version is not None and not isinstance(found, types.FunctionType | type)):
                self.put("of", value.__name__, version or "", part, *rest)
                return
            value = found
        self.feed(value, at, files)

    def _class(self, kind: type, at: At, files: bool) -> None:
        fixed = not kind.__flags__ & HEAP
        if name := f"{kind.__module__}.{kind.__qualname__}" if fixed else self._known(kind, kind.__module__):
            self.put("class", name)
            return
        self.put("class", kind.__qualname__)
        self.feed((kind.__bases__, type(kind)), at, files)
        for name, value in sorted(vars(kind).items()):
            dunder = name.startswith("__") and name.endswith("__")
            if name not in CACHES and (not dunder or isinstance(value, METHODS)):
                self.put(name)
                self.feed(value, (at, f".{name}"), files)

    def _builtin(self, thing: Any, at: At, files: bool) -> None:
        module, owner = getattr(thing, "__module__", None), getattr(thing, "__objclass__", None)
        self.put("builtin", str(module), thing.__qualname__, "" if owner is None else owner.__qualname__)
        bound = getattr(thing, "__self__", None)
        if not isinstance(bound, types.ModuleType | type | None):
            self.feed(bound, (at, ".__self__"), files)
        elif module is not None:
            self._module(module, at, files)

    def _module(self, name: str, at: At, files: bool) -> None:
        """A module by name and version or, where it is the user's own, by what it compiles to."""
        version = self._version(name)
        self.put("module", name, "own" if version is None else version)
        if version is not None or name in self.modules:
            return
        self.modules.add(name)
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else spec_of(name)
        if spec is None and loaded is not None:
            raise Uncacheable(f"{_told(at)}: the module {name} cannot be looked into, only what it holds")
        if spec is None:
            return
        code = spec.loader.get_code(name) if spec.loader is not None and hasattr(spec.loader, "get_code") else None
        if code is not None:
            self._code(code, {"__package__": spec.parent}, at, files)
        elif spec.origin is not None and os.path.isfile(spec.origin):
            self.put(hashlib.sha256(Path(spec.origin).read_bytes()).digest())

    def _known(self, thing: Any, module: Any) -> str | None:
        """The name and version of a function or class that an installed module has under its own name."""
        version = self._version(str(module))
        if version is None:
            return None
        found = named(str(module), thing.__qualname__)
        same = getattr(found, "__func__", found) is thing
        return f"{module}.{thing.__qualname__} {version}" if same else None

    def _version(self, module: str) -> str | None:
        """The version of the installed package that a module belongs to; None for the user's own modules."""
        top = module.partition(".")[0]
        if top not in self.versions:
            self.versions[top] = installed(top)
        return self.versions[top]


def _unseen(thing: Any, at: At, wrong: Exception) -> Uncacheable:
    kind = type(thing)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    known = isinstance(wrong, TypeError) and "pickle" in str(wrong)
    more = "" if known else ": " + textwrap.shorten(str(wrong), 200, placeholder=" ...")
    return Uncacheable(f"{_told(at)}: {name} cannot be looked into{more}")


def _rank(member: Any) -> tuple[str, str]:
    """An order of a set's members that does not hang on the process."""
    return type(member).__qualname__, str(getattr(member, "__qualname__", "")) or repr(member)


def _renumbered(hooks: dict[str, Any]) -> dict[str, Any]:
    """A module's hooks, in order, by numbers that do not hang on how many were made before in the process."""
    numbers = {n: k for k, n in enumerate(sorted({n for held in hooks.values() for n in held if isinstance(n, int)}))}
    return {name: {numbers.get(n, n): hook for n, hook in held.items()} for name, held in hooks.items()}


def _slots(kind: type) -> list[Any]:
    return [v for base in kind.__mro__ for v in vars(base).values() if isinstance(v, types.MemberDescriptorType)]


def _all_in_python(kind: type) -> bool:
    """Whether instances hold nothing but a `__dict__` and slots: no room is left for what only C sees."""
    kept = len(_slots(kind)) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    return not kind.__itemsize__ and kind.__basicsize__ == object.__basicsize__ + 8 * kept
