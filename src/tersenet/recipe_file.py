"""Recipes in YAML: a paper with its settings, or a list of stages, checked field by field before anything runs.

paper: deep-compression
density: 0.05

stages:
  - prune: {density: 0.05, rounds: 8}
  - pack: {method: {kmeans: {bits: 4}}, other: [[conv*, {uniform: {bits: 8}}]]}
  - finetune: {epochs: 2}
  - narrow: {}
"""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from tersenet.methods import Chain, Method
from tersenet.methods.kmeans import KMeans
from tersenet.methods.sparse import Magnitude
from tersenet.methods.transform import KernelDCT
from tersenet.methods.uniform import Uniform
from tersenet.papers import PAPERS
from tersenet.run import Recipe
from tersenet.stages.channels import Channels, DropDead
from tersenet.stages.finetune import Finetune, TrainLevels
from tersenet.stages.obs import OBS
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune, Retrain
from tersenet.stages.waterfill import Waterfill

STAGES: dict[str, type] = {
    "prune": Prune,
    "pack": Pack,
    "finetune": Finetune,
    "narrow": Narrow,
    "waterfill": Waterfill,
    "retrain": Retrain,
    "obs": OBS,
    "train-levels": TrainLevels,
    "channels": Channels,
    "drop-dead": DropDead,
}
METHODS: dict[str, type] = {
    "magnitude": Magnitude,
    "kmeans": KMeans,
    "uniform": Uniform,
    "kernel-dct": KernelDCT,
}


def find_recipe(name: str, seed: int | None = None) -> Recipe:
    """The recipe of a paper's name or a YAML file; raises ValueError that says which field is wrong."""
    if name.endswith((".yaml", ".yml")):
        try:
            read = yaml.safe_load(Path(name).read_text())
        except yaml.YAMLError as wrong:
            raise ValueError(f"{name}: not YAML: {' '.join(str(wrong).split())}") from None
        return parse_recipe(read, name, seed)
    return parse_recipe({"paper": name}, "--recipe", seed)


def parse_recipe(read: Any, where: str, seed: int | None = None) -> Recipe:
    """The recipe that a parsed YAML document describes."""
    if not isinstance(read, Mapping) or ("paper" in read) == ("stages" in read):
        raise ValueError(f"{where}: a recipe has either 'paper' or 'stages'")
    if "paper" in read:
        settings = {k: v for k, v in read.items() if k != "paper"}
        paper = _one_of(PAPERS, read["paper"], f"{where}: paper")
        if seed is not None and "seed" in inspect.signature(paper).parameters:
            settings.setdefault("seed", seed)
        known = list(inspect.signature(paper).parameters)
        if unknown := [k for k in settings if k not in known]:
            raise ValueError(f"{where}: {read['paper']} has no setting {unknown[0]!r}; it has {', '.join(known)}")
        try:
            return TypeAdapter(Any).validate_python(paper(**settings))  # type: ignore[no-any-return]
        except TypeError as wrong:
            raise ValueError(f"{where}: {wrong}") from None
    if not isinstance(read["stages"], list) or not read["stages"]:
        raise ValueError(f"{where}: stages is a list of one stage or more")
    return tuple(_stage(entry, f"{where}: stage {i}", seed) for i, entry in enumerate(read["stages"], 1))


def _stage(entry: Any, where: str, seed: int | None) -> Any:
    name, settings = _named(entry, where)
    stage = _one_of(STAGES, name, where)
    if seed is not None and "seed" in {f.name for f in fields(stage)}:
        settings = {"seed": seed, **settings}
    if "method" in settings:
        settings["method"] = _method(settings["method"], f"{where} ({name}): method")
    if "other" in settings:
        settings["other"] = tuple((p, _method(m, f"{where} ({name}): other")) for p, m in settings["other"])
    return _built(stage, settings, f"{where} ({name})")


def _method(entry: Any, where: str) -> Method:
    if isinstance(entry, list):
        return Chain(tuple(_method(part, where) for part in entry))
    name, settings = _named(entry, where)
    method: Method = _built(_one_of(METHODS, name, where), settings, f"{where} ({name})")
    return method


def _named(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(f"{where}: write one name with its settings, e.g. 'prune: {{density: 0.1}}'")
    name, settings = next(iter(entry.items()))
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f"{where} ({name}): settings are written {{name: value}}")
    return str(name), dict(settings or {})


def _one_of(table: Mapping[str, Any], name: Any, where: str) -> Any:
    if name not in table:
        raise ValueError(f"{where}: no {name!r}; there are {', '.join(table)}")
    return table[name]


def _built(kind: type, settings: dict[str, Any], where: str) -> Any:
    known = {f.name: f.type for f in fields(kind)}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{where}: no setting {name!r}; there are {', '.join(n for n in known if n != 'needs')}")
        if name in ("method", "other"):
            continue
        try:
            adapter = TypeAdapter[Any](known[name])  # type: ignore[arg-type]
            settings[name] = adapter.validate_python(value)
        except ValidationError as wrong:
            raise ValueError(f"{where}: {name} is {value!r}: {wrong.errors()[0]['msg'].lower()}") from None
    try:
        return kind(**settings)
    except ValueError as wrong:
        raise ValueError(f"{where}: {wrong}") from None
