"""Recipes in YAML: a paper with its settings, or a list of stages, checked field by field before anything runs.

paper: deep-compression
density: 0.05

stages:
  - prune: {density: 0.05, rounds: 8, rules: [[conv1.weight, 0.5]]}
  - pack: {method: {kmeans: {bits: 4}}, rules: [[{kind: embedding}, {uniform: {bits: 8}}], [head*, null]]}
  - finetune: {epochs: 2}
  - narrow

What has a name in one of the tables is written as the name, or {name: settings}; a list of methods is their chain.
pydantic reads all of it as one union, whose settings are the fields of our own values.
"""

import contextlib
import functools
import inspect
import operator
import re
import textwrap
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    create_model,
)

from tersenet.allocators.amc import AMC, RandomSearch
from tersenet.methods import Chain, Method
from tersenet.methods.compact import CReLU, Fire, Grouped, Rotations, Separable
from tersenet.methods.cp import CP
from tersenet.methods.factorize import SVD, Tucker2
from tersenet.methods.fixed_point import FixedPoint, PowersOfTwo, Ternary
from tersenet.methods.kmeans import KMeans
from tersenet.methods.product import Product
from tersenet.methods.sparse import Magnitude
from tersenet.methods.surgeon import SparseGPT
from tersenet.methods.tensor_train import TensorTrain
from tersenet.methods.transform import KernelDCT
from tersenet.methods.uniform import Uniform
from tersenet.papers import PAPERS
from tersenet.run import Recipe
from tersenet.stages.activations import Activations
from tersenet.stages.channels import Channels, DropDead, SearchChannels
from tersenet.stages.dkm import DKM
from tersenet.stages.finetune import Distill, Finetune, TrainLevels
from tersenet.stages.hashed import Hash
from tersenet.stages.layerwise import Layerwise
from tersenet.stages.levels import INQ, MLQ, SLQ
from tersenet.stages.low_precision import LowPrecision
from tersenet.stages.lowrank import ENC
from tersenet.stages.lsq import LSQ
from tersenet.stages.obs import OBS
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune, Retrain
from tersenet.stages.recalibrate import Recalibrate
from tersenet.stages.universal import Universal
from tersenet.stages.waterfill import Waterfill
from tersenet.stages.weightless import Weightless
from tersenet.where import Where

STAGES: dict[str, type] = {
    "prune": Prune,
    "pack": Pack,
    "layerwise": Layerwise,
    "finetune": Finetune,
    "narrow": Narrow,
    "waterfill": Waterfill,
    "retrain": Retrain,
    "obs": OBS,
    "distill": Distill,
    "slq": SLQ,
    "mlq": MLQ,
    "inq": INQ,
    "lsq": LSQ,
    "dkm": DKM,
    "activations": Activations,
    "low-precision": LowPrecision,
    "universal": Universal,
    "hash": Hash,
    "weightless": Weightless,
    "train-levels": TrainLevels,
    "channels": Channels,
    "search-channels": SearchChannels,
    "drop-dead": DropDead,
    "enc": ENC,
    "recalibrate": Recalibrate,
}
METHODS: dict[str, type] = {
    "magnitude": Magnitude,
    "kmeans": KMeans,
    "product": Product,
    "uniform": Uniform,
    "fixed-point": FixedPoint,
    "ternary": Ternary,
    "powers-of-two": PowersOfTwo,
    "kernel-dct": KernelDCT,
    "sparsegpt": SparseGPT,
    "svd": SVD,
    "tucker2": Tucker2,
    "cp": CP,
    "tensor-train": TensorTrain,
    "separable": Separable,
    "fire": Fire,
    "grouped": Grouped,
    "crelu": CReLU,
    "rotations": Rotations,
}
SEARCHES: dict[str, type] = {"amc": AMC, "random": RandomSearch}
SCALAR = ("int", "str")  # what pydantic says of the ways to write one value
EXAMPLE = "write one name with its settings, e.g. 'prune: {density: 0.1}'"


def find_recipe(name: str, seed: int | None = None) -> Recipe:
    """The recipe of a paper's name or a YAML file; raises ValueError that says which field is wrong."""
    if name.endswith((".yaml", ".yml")):
        try:
            read = yaml.safe_load(Path(name).read_text())
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as wrong:
            raise ValueError(f"{name}: not YAML: {' '.join(str(wrong).split())}") from None
        return parse_recipe(read, name, seed)
    return parse_recipe({"paper": name}, "--recipe", seed)


def parse_recipe(read: Any, where: str, seed: int | None = None) -> Recipe:
    """The recipe that a parsed YAML document describes; `seed` is that of all that names none of its own."""
    if not isinstance(read, Mapping) or ("paper" in read) == ("stages" in read):
        raise ValueError(f"{where}: a recipe has either 'paper' or 'stages'")
    paper, stage, _ = _readers()
    if "paper" in read:
        settings = {name: value for name, value in read.items() if name != "paper"}
        named = isinstance(read["paper"], str)
        found: Recipe = _read(paper, {read["paper"]: settings} if named else None, f"{where}: paper", seed)
        return found
    if read.keys() != {"stages"} or not isinstance(read["stages"], list) or not read["stages"]:
        raise ValueError(f"{where}: stages is a list of one stage or more, and there is nothing beside it")
    return tuple(_read(stage, one, f"{where}: stage {k}", seed) for k, one in enumerate(read["stages"], 1))


def parse_rule(text: str, seed: int | None = None) -> tuple[str, Method]:
    """The rule of a text 'WHERE=METHOD', e.g. 'conv*=kmeans:bits=4' or 'fc*=magnitude:density=0.1+kmeans'."""
    where, equals, spec = text.partition("=")
    if not (where and equals and spec):
        raise ValueError(f"the rule {text!r}: write a pattern of names and a method, e.g. 'conv*=kmeans:bits=4'")
    chain = []
    for part in re.split(r"\+(?=[a-z])", spec):
        name, _, told = part.partition(":")
        pairs = [pair.partition("=") for pair in told.split(",") if pair]
        try:
            chain.append({name: {setting: yaml.safe_load(value) for setting, _, value in pairs}})
        except yaml.YAMLError:
            raise ValueError(f"the rule {text!r}: settings are written 'kmeans:bits=4,start=linear'") from None
    return where, _read(_readers()[2], chain if len(chain) > 1 else chain[0], f"the rule {text!r}", seed)


def _read(adapter: TypeAdapter[Any], value: Any, where: str, seed: int | None) -> Any:
    """The value that something parsed stands for; raises ValueError with the first thing that is wrong, in one line."""
    try:
        return adapter.validate_python(value, context=seed)
    except ValidationError as wrong:
        raise ValueError(f"{where}{_told(wrong.errors()[0])}") from None


def _told(error: Any) -> str:
    """What is wrong, and where: the name in brackets, then the way to the setting."""
    name, *rest = error["loc"] or ("",)
    way = ".".join(str(at + 1 if isinstance(at, int) else at) for at in rest if at not in SCALAR)
    head = (f" ({name})" if name else "") + ": " + way
    if error["type"] == "missing":
        return f"{head} is not given"
    if error["type"] in ("value_error", "union_tag_invalid", "union_tag_not_found"):
        given = error.get("ctx", {})
        text = given.get("error", EXAMPLE)
        if "tag" in given:
            text = f"no {given['tag']!r}; there are {given['expected_tags'].replace(chr(39), '')}"
        return f"{head}: {text}" if way else f"{head}{text}"
    return f"{head} is {textwrap.shorten(repr(error['input']), 80)}: {error['msg'].lower().replace('tuple', 'list')}"


@functools.cache
def _readers() -> tuple[TypeAdapter[Any], TypeAdapter[Any], TypeAdapter[Any]]:
    """What reads a paper, a stage and a method."""
    return TypeAdapter(_union(_parts(PAPERS))), TypeAdapter(_union(_parts(STAGES))), TypeAdapter(_type(Method))


def _type(hint: Any) -> Any:
    """How a field of this type is written: numbers strictly, our own values as their settings."""
    if hint == Method:
        single = _parts(METHODS)
        several: Any = types.GenericAlias(list, (_union(single),))
        return _union((*single, Annotated[several, AfterValidator(lambda read: Chain(tuple(read))), Tag("chain")]))
    if hint == AMC | RandomSearch:
        return _union(_parts(SEARCHES))
    if hint == Where | str:
        text, where = Annotated[StrictStr, Tag("str")], Annotated[_settings(Where), Tag("where")]
        return Annotated[text | where, Discriminator(lambda value: "where" if isinstance(value, Mapping) else "str")]
    if hint in SCALARS:
        return SCALARS[hint]
    if isinstance(hint, type) and is_dataclass(hint):
        return _settings(hint)
    parts = tuple(part if part is Ellipsis else _type(part) for part in get_args(hint))
    return types.GenericAlias(tuple, parts) if get_origin(hint) is tuple else functools.reduce(operator.or_, parts)


def _union(parts: tuple[Any, ...]) -> Any:
    """One of the parts, told by their tags."""
    return Annotated[functools.reduce(operator.or_, parts), Discriminator(_name)]


def _parts(table: Mapping[str, Callable[..., Any]]) -> tuple[Any, ...]:
    """What may be written of a table: one of its names, or {name: settings}."""
    return tuple(Annotated[_settings(made), BeforeValidator(_inside), Tag(name)] for name, made in table.items())


def _name(value: Any) -> Any:
    if isinstance(value, list):
        return "chain"
    name = next(iter(value)) if isinstance(value, Mapping) and len(value) == 1 else value
    return name if isinstance(name, str) else None


def _inside(value: Any) -> Any:
    return {} if isinstance(value, str) else next(iter(value.values())) or {}


def _settings(made: Callable[..., Any]) -> Any:
    """How what a class or a function takes is written: {name: value}."""
    takes, hints = inspect.signature(made).parameters, get_type_hints(made)
    known = {name: (_type(hints[name]), ... if one.default is one.empty else None) for name, one in takes.items()}

    def check(value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError("settings are written {name: value}")
        if unknown := [name for name in value if name not in known]:
            raise ValueError(f"no setting {unknown[0]!r}; there are {', '.join(known) or 'none'}")
        return {"seed": info.context, **value} if "seed" in known and info.context is not None else value

    def build(read: BaseModel, info: ValidationInfo) -> Any:
        given = {name: getattr(read, name) for name in read.model_fields_set}
        value = made(**given)
        if info.context is None or isinstance(value, tuple):
            return value
        rest = {field.name: getattr(value, field.name) for field in fields(value) if field.name not in given}
        return replace(value, **{n: replace(v, seed=info.context) for n, v in rest.items() if hasattr(v, "seed")})

    model = create_model(made.__name__, **known)  # type: ignore[call-overload]
    return Annotated[model, BeforeValidator(check), AfterValidator(build)]


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as a text."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


SCALARS: dict[Any, Any] = {
    int: StrictInt,
    float: Annotated[float, BeforeValidator(_number), Field(strict=True, allow_inf_nan=False)],
    bool: StrictBool,
    str: StrictStr,
    type(None): None,
}
