"""Recipes in YAML, and the errors that wrong ones get."""

import dataclasses

import pytest

import tersenet as tn
from tersenet import recipe_file, where
from tersenet.allocators.amc import AMC, RandomSearch
from tersenet.artifact import Coding
from tersenet.budget import Budget
from tersenet.methods import Chain, chain
from tersenet.methods.kmeans import KMeans
from tersenet.methods.sparse import Magnitude
from tersenet.methods.surgeon import SparseGPT
from tersenet.methods.transform import KernelDCT
from tersenet.methods.uniform import Uniform
from tersenet.recipe_file import METHODS, STAGES, find_recipe, parse_recipe, parse_rule
from tersenet.stages.channels import SearchChannels
from tersenet.stages.layerwise import Layerwise
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune
from tersenet.stages.waterfill import Waterfill
from tersenet.waterfilling.factors import Damping
from tersenet.where import Where

TEXT = """
stages:
  - prune: {density: 0.05, rounds: 8, rules: [[conv1.weight, 0.5]]}
  - pack:
      method: [kernel-dct, {magnitude: {density: 1e-1}}, {kmeans: {weighted: true}}]
      rules: [["conv*", {uniform: {bits: 6}}], [{kind: embedding, least: 1000}, null]]
  - layerwise: {method: sparsegpt, tune: 1, seed: 1}
  - search-channels: {macs: 0.3, search: {random: {episodes: 3}}}
  - search-channels
  - waterfill: {c: 1e-3, damping: {rows: 1}, coding: {codecs: [bits]}}
  - waterfill: {budget: {size: 40kB}}
  - narrow
"""


def test_a_list_of_stages_becomes_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(TEXT)
    dct = chain(KernelDCT(), Magnitude(0.1), KMeans(seed=3, weighted=True))
    assert find_recipe(str(path), seed=3) == (
        Prune(0.05, 8, rules=(("conv1.weight", 0.5),), seed=3),
        Pack(dct, rules=(("conv*", Uniform(6)), (Where(kind="embedding", least=1000), None)), seed=3),
        Layerwise(SparseGPT(), tune=1, seed=1),
        SearchChannels(0.3, RandomSearch(3, seed=3)),
        SearchChannels(search=AMC(seed=3)),
        Waterfill(0.001, damping=Damping(rows=1.0), coding=Coding(("bits",))),
        Waterfill(budget=Budget(size=40_000)),
        Narrow(),
    )


def test_every_stage_and_method_is_read_by_its_name_and_with_all_its_settings():
    for name, kind in STAGES.items():
        needs = {"method": "kmeans"} if kind is Layerwise else {}
        (stage,) = parse_recipe({"stages": [{name: needs}]}, "r")
        assert stage == kind(**({"method": KMeans()} if needs else {}))
    for name, kind in METHODS.items():
        (pack,) = parse_recipe({"stages": [{"pack": {"method": name}}]}, "r")
        assert pack == Pack(kind())
        plain = dataclasses.asdict(kind())
        assert parse_recipe({"stages": [{"pack": {"method": {name: plain}}}]}, "r") == (pack,)


def test_a_paper_takes_its_settings():
    assert parse_recipe({"paper": "deep-compression", "bits": 4}, "x") == tn.papers.deep_compression(bits=4)
    assert find_recipe("deep-compression", 5) == tn.papers.deep_compression(seed=5)
    read = {"paper": "output-aware", "budget": {"ratio": 8}}
    assert parse_recipe(read, "x") == tn.papers.output_aware(Budget(ratio=8))


@pytest.mark.parametrize("name", tn.papers.PAPERS)
def test_a_recipe_prints_as_what_makes_it_again(name):
    tables = (*STAGES.values(), *METHODS.values(), AMC, RandomSearch, Damping, Budget, Coding, Chain, where.Where)
    recipe = find_recipe(name, 7)
    assert eval(repr(recipe), {kind.__name__: kind for kind in tables}) == recipe
    ruled = (Pack(chain(Magnitude(0.2), KMeans()), rules=((Where("a*", least=3), None), ("b", Uniform(4)))),)
    assert eval(repr(ruled), {kind.__name__: kind for kind in tables}) == ruled


@pytest.mark.parametrize(
    "text,method",
    [
        ("kmeans", KMeans()),
        ("kmeans:bits=4,start=exact,weighted=true", KMeans(4, "exact", weighted=True)),
        ("magnitude:density=1e-1+uniform:bits=3", chain(Magnitude(0.1), Uniform(3))),
    ],
)
def test_a_rule_of_the_command_is_read_as_yaml_is(text, method):
    assert parse_rule(f"conv*={text}") == ("conv*", method)


@pytest.mark.parametrize(
    "text,message",
    [
        ("conv*", "write a pattern of names and a method"),
        ("conv*=", "write a pattern of names and a method"),
        ("a=kmean", "no 'kmean'; there are magnitude"),
        ("a=kmeans:bits=4.5", r"\(kmeans\): bits is 4.5: input should be a valid integer"),
        ("a=kmeans:bit=4", "no setting 'bit'; there are bits"),
        ("a=kmeans:bits=[", "settings are written"),
        ("a=kmeans+magnitude:density=2.x", "2.magnitude.density is '2.x'"),
    ],
)
def test_wrong_rules_say_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message) as wrong:
        parse_rule(text)
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    "read,message",
    [
        ({}, "either 'paper' or 'stages'"),
        ({"paper": "deepest"}, "paper: no 'deepest'; there are output-aware"),
        ({"paper": ["a"]}, "paper: write one name"),
        ({"paper": "deep-compression", "bit": 4}, r"\(deep-compression\): no setting 'bit'; there are density"),
        ({"paper": "deep-compression", "bits": 4.5}, "bits is 4.5: input should be a valid integer"),
        ({"paper": "deep-compression", "bits": True}, "bits is True"),
        ({"paper": "lr-rewinding", "density": 0}, r"a density is in \(0, 1\]"),
        ({"paper": "output-aware", "budget": {"size": 1, "drop": 2}}, "budget: a budget is one of"),
        ({"paper": "output-aware", "budget": {"size": [1]}}, r"budget.size is \[1\]"),
        ({"stages": []}, "one stage or more"),
        ({"stages": ["narrow"], "density": 1}, "nothing beside it"),
        ({"stages": ["prun"]}, "stage 1: no 'prun'; there are prune"),
        ({"stages": ["narrow", None]}, "stage 2: write one name"),
        ({"stages": [{"prune": 5}]}, r"stage 1 \(prune\): settings are written"),
        ({"stages": [{"prune": {"density": "much"}}]}, r"stage 1 \(prune\): density is 'much'"),
        ({"stages": [{"prune": {"density": float("nan")}}]}, "density is nan: input should be a finite number"),
        ({"stages": [{"prune": {"density": 2}}]}, r"density in \(0, 1\]"),
        ({"stages": [{"prune": {"rounds": 2.5}}]}, "rounds is 2.5"),
        ({"stages": [{"prune": {"dense": 1}}]}, "no setting 'dense'"),
        ({"stages": [{"prune": {"rules": [["conv*"]]}}]}, "rules.1.2 is not given"),
        ({"stages": [{"pack": {"method": "kmean"}}]}, "method: no 'kmean'; there are magnitude"),
        ({"stages": [{"pack": {"method": {"kmeans": {"bits": 40}}}}]}, "1 to 12 bits"),
        ({"stages": [{"pack": {"other": 5}}]}, r"\(pack\): no setting 'other'; there are method, rules"),
        ({"stages": [{"pack": {"rules": 5}}]}, "rules is 5: input should be a valid list"),
        ({"stages": [{"pack": {"rules": [["a", "kmeans"], ["b", {"kmeans": {"bits": "4"}}]]}}]}, "2.2.kmeans.bits"),
        ({"stages": [{"pack": {"rules": [[{"kind": "cov*"}, None]]}}]}, r"no kind 'cov\*'; there are linear"),
        ({"stages": ["layerwise"]}, "method is not given"),
        ({"stages": [{"waterfill": {"damping": {"row": 1}}}]}, "damping: no setting 'row'; there are inputs, rows"),
        ({"stages": [{"a": 1, "b": 2}]}, "one name with its settings"),
    ],
)  # fmt: skip
def test_wrong_recipes_say_what_is_wrong(read, message):
    with pytest.raises(ValueError, match=message) as wrong:
        parse_recipe(read, "recipe")
    assert str(wrong.value).startswith("recipe: ") and "\n" not in str(wrong.value)


def test_the_example_of_the_docstring_is_read():
    stages = "stages:" + recipe_file.__doc__.split("stages:")[1].split("\n\n")[0]
    recipe = parse_recipe(recipe_file.yaml.safe_load(stages), "docstring")
    assert [type(stage).__name__ for stage in recipe] == ["Prune", "Pack", "Finetune", "Narrow"]
