"""Networks that others trained, on data they were trained for; skipped where these are not beside the project."""

import numpy as np
import torch

import tersenet as tn
from tersenet.artifact import load
from tersenet.budget import Budget
from tersenet.draft import Draft, artifact_of
from tersenet.stages.obs import OBS
from tersenet.stages.prune import Prune


def task_of(data, name, split, count):
    datasets, models = data
    parts = {}
    for part, limit in (("train", count), ("test", None)):
        images, labels = datasets.load(split, part, limit)
        parts[part] = (models.inputs(name, images), torch.from_numpy(labels).long())
    return tn.Task(models.load(name), **parts)


def test_deep_compression_makes_lenet_300_thirty_times_smaller_in_one_short_round(data, tmp_path):
    task = task_of(data, "lenet300", "mnist", 12_000)
    recipe = tn.papers.deep_compression(density=0.1, bits=4, rounds=1, epochs=1)
    result = tn.compress(task, recipe, folder=tmp_path)
    assert result.before == 0.9772
    assert result.after > result.before - 0.012
    assert result.artifact.nbytes < 4 * 266_610 / 30


def test_resnet20_keeps_its_accuracy_at_a_thirteenth_of_its_size_without_retraining(data):
    task = task_of(data, "resnet20", "cifar10", 285)
    result = tn.compress(task, budget=Budget(size="80kB"))
    assert result.before == 0.9173
    assert result.after > result.before - 0.012
    assert 0.97 * 80_000 <= result.artifact.nbytes <= 80_000


def test_surgery_keeps_lenet_300_at_a_tenth_of_its_weights_where_magnitude_does_not(data):
    task = task_of(data, "lenet300", "mnist", 1_200)

    def score(stage):
        draft = stage(Draft.of_model(data[1].load("lenet300")), task)
        return task.score(task.test, artifact_of(draft).into(draft.model))

    magnitude = score(Prune(0.1, 1, retrain="none"))
    assert score(OBS(0.1, "kronecker", "sum")) > magnitude + 0.01
    assert score(OBS(0.1, "kronecker", "best")) > magnitude + 0.03
    assert score(OBS(0.1, "sweep")) > score(Prune(0.1, 1, retrain="none", scope="layer")) + 0.01


def test_every_given_network_survives_the_file_bit_for_bit_when_nothing_is_packed(data):
    _, models = data
    for name in ("lenet5", "resnet56", "squeezenet11", "charlstm"):
        model = models.load(name)
        back = load(artifact_of(Draft.of_model(model), tn.Coding(("bits", "rans"))).to_bytes()).unpack()
        for key, value in model.state_dict().items():
            assert np.array_equal(back[key], value.numpy()) and back[key].dtype == value.numpy().dtype, key
