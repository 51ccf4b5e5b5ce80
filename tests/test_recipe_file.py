"""Recipes in YAML, and the errors that wrong ones get."""

import pytest

import tersenet as tn
from tersenet.methods import chain
from tersenet.methods.kmeans import KMeans
from tersenet.methods.sparse import Magnitude
from tersenet.methods.transform import KernelDCT
from tersenet.methods.uniform import Uniform
from tersenet.recipe_file import find_recipe, parse_recipe
from tersenet.stages.pack import Pack
from tersenet.stages.prune import Prune

TEXT = """
stages:
  - prune: {density: 0.05, rounds: 8, layers: [[conv1.weight, 0.5]]}
  - pack: {method: [kernel-dct, {magnitude: {density: 0.5}}, kmeans], other: [["conv*", {uniform: {bits: 6}}]]}
  - narrow
"""


def test_a_list_of_stages_becomes_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(TEXT)
    prune, pack, _ = find_recipe(str(path), seed=3)
    assert prune == Prune(0.05, 8, layers=(("conv1.weight", 0.5),), seed=3)
    assert pack == Pack(chain(KernelDCT(), Magnitude(0.5), KMeans()), other=(("conv*", Uniform(6)),))


def test_a_paper_takes_its_settings():
    assert parse_recipe({"paper": "deep-compression", "bits": 4}, "x") == tn.papers.deep_compression(bits=4)
    assert find_recipe("deep-compression", 5) == tn.papers.deep_compression(seed=5)


@pytest.mark.parametrize(
    "read,message",
    [
        ({}, "either 'paper' or 'stages'"),
        ({"paper": "deepest"}, "no 'deepest'; there are deep-compression"),
        ({"paper": "deep-compression", "bit": 4}, "has no setting 'bit'; it has density"),
        ({"stages": []}, "one stage or more"),
        ({"stages": ["prun"]}, "stage 1: no 'prun'; there are prune"),
        ({"stages": [{"prune": {"density": "much"}}]}, r"stage 1 \(prune\): density is 'much'"),
        ({"stages": [{"prune": {"density": 2}}]}, r"density in \(0, 1\]"),
        ({"stages": [{"prune": {"dense": 1}}]}, "no setting 'dense'"),
        ({"stages": [{"pack": {"method": "kmean"}}]}, "no 'kmean'; there are magnitude"),
        ({"stages": [{"pack": {"method": {"kmeans": {"bits": 40}}}}]}, "1 to 12 bits"),
        ({"stages": [{"a": 1, "b": 2}]}, "one name with its settings"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(read, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(read, "recipe")
