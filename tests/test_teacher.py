"""Teachers: soft targets, mixing, ensembles, features of layers inside, and that training leaves no trace in them."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tersenet as tn
from tersenet.draft import Draft, artifact_of
from tersenet.key import key_of
from tersenet.methods.kmeans import KMeans
from tersenet.stages.finetune import Distill, Finetune
from tersenet.stages.lsq import LSQ
from tersenet.stages.pack import Pack
from tersenet.stages.prune import Prune, Retrain
from tersenet.teacher import soft_targets


class Net(nn.Module):
    """An activation that works in place follows the first layer; the second is called twice."""

    def __init__(self, width=8, dropout=0.0):
        super().__init__()
        self.first, self.norm, self.act = nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)
        self.twice, self.drop, self.last = nn.Linear(width, width), nn.Dropout(dropout), nn.Linear(width, 3)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        return self.last(self.drop(torch.tanh(self.twice(torch.tanh(self.twice(x))))))


def net(seed, **options):
    torch.manual_seed(seed)
    return Net(**options).eval()


def task_of(teacher, model=None):
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    schedule = tn.Schedule(epochs=2, lr=0.05, batch=16)
    return tn.Task(model or net(1), (x, y), (x, y), valid=(x, y), schedule=schedule, teacher=teacher)


def batch(task):
    return task.train[0][:16], task.train[1][:16]


def inside(model, x):
    """Outputs of `first` and of both calls of `twice`, by hand."""
    first = model.first(x)
    once = model.twice(torch.relu(model.norm(first)))
    return first, once, model.twice(torch.tanh(once))


def test_features_add_the_squared_errors_of_layers_to_soft_targets_and_loss():
    teachers, student = (net(5), net(6)), net(1)
    task = task_of(tn.Teacher(teachers, 2.0, 0.7, {"first": "first", "twice": "twice"}, weight=0.3), student)
    x, y = batch(task)
    said = torch.stack([(t(x) / 2).softmax(1) for t in teachers]).mean(0)
    expected = 0.7 * 4 * F.kl_div((student(x) / 2).log_softmax(1), said, reduction="sum") / 16
    expected = expected + 0.3 * F.cross_entropy(student(x), y)
    for teacher in teachers:
        first, once, again = (F.mse_loss(a, b) for a, b in zip(inside(student, x), inside(teacher, x), strict=True))
        expected = expected + 0.15 * (first + (once + again) / 2)
    found = task.loss_of(student, x, y)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert student.first.weight.grad is not None and all(p.grad is None for t in teachers for p in t.parameters())


def test_layers_are_matched_by_name_across_architectures_and_without_soft_targets():
    teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    task = task_of(tn.Teacher(teacher, mix=0, features={"first": "0"}))
    x, y = batch(task)
    expected = F.cross_entropy(task.model(x), y) + F.mse_loss(task.model.first(x), teacher[0](x))
    assert task.loss_of(task.model, x, y).item() == pytest.approx(expected.item(), rel=1e-5)


STAGES = {
    "Finetune": (Finetune(2, 0.05),),
    "Finetune, mean": (Finetune(2, 0.05, gradient="mean"),),
    "Distill": (Distill(2, 0.05),),
    "Prune": (Prune(0.5, 2),),
    "Retrain": (Prune(0.5, 1, retrain="none"), Retrain("learning-rate", 2)),
    "LSQ": (LSQ(4, epochs=2),),
}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_that_trains_brings_features_nearer_to_the_teachers(name):
    apart = {}
    for features in ((), ("first", "twice")):
        teacher = net(5)
        task = task_of(tn.Teacher(teacher, features=features, weight=30.0))
        draft = Draft.of_model(task.model)
        for stage in STAGES[name]:
            draft = stage(draft, task)
        student, x = draft.module().eval(), task.train[0]
        with torch.no_grad():
            errors = [F.mse_loss(a, b) for a, b in zip(inside(student, x), inside(teacher, x), strict=True)]
        apart[features] = float(sum(errors))
        for model in (task.model, teacher, student):
            assert not any(layer._forward_hooks for layer in model.modules())
    assert apart["first", "twice"] < 0.8 * apart[()]


def test_a_task_with_a_teacher_trains_towards_it_too():
    teacher, apart = net(5), []
    for taught in (None, tn.Teacher(teacher, 2.0)):
        student = task_of(taught).trained().model
        with torch.no_grad():
            x = task_of(None).train[0]
            apart.append(float(soft_targets(student(x), teacher(x))))
    assert apart[1] < 0.5 * apart[0]


def test_a_teacher_that_was_left_in_training_mode_says_what_it_says_in_evaluation_and_stays_as_it_was():
    teacher = net(5, dropout=0.5).train()
    before = copy.deepcopy(teacher.state_dict())
    draft = Draft.of_model(net(1))
    found = artifact_of(Finetune(1)(draft, task_of(tn.Teacher(teacher, features="first")))).to_bytes()
    still = copy.deepcopy(teacher).eval()
    assert found == artifact_of(Finetune(1)(draft, task_of(tn.Teacher(still, features="first")))).to_bytes()
    assert all(layer.training for layer in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_compiled_part_of_the_student_is_heard_too_or_refused():
    student = net(1)
    task = task_of(tn.Teacher(net(5), features={"first": "first"}), student)
    x, y = batch(task)
    expected = task.loss_of(student, x, y).item()
    student.first = torch.compile(student.first, backend="eager")
    for _ in range(2):
        assert task.loss_of(student, x, y).item() == pytest.approx(expected, rel=1e-6)


def test_results_are_kept_under_what_the_teacher_says_and_shows():
    ways = [{}, {"features": "first"}, {"features": "twice"}, {"features": "first", "weight": 2.0}]
    keys = [key_of(tn.Teacher(net(5), **way)) for way in (*ways, *ways)]
    assert keys[:4] == keys[4:] and len(set(keys)) == 4


@pytest.mark.parametrize(
    "features,wide,words",
    [
        (("nowhere",), 8, "nowhere: the student has no such layer"),
        ({"first": "nowhere"}, 8, "nowhere: the teacher has no such layer"),
        (("first",), 12, r"first: .* the student gives \[16, 8\], and the teacher's first \[16, 12\]: name other"),
        ({"first": "twice"}, 8, r"first: .* gives \[16, 8\], and the teacher's twice \[16, 8\], \[16, 8\]"),
        (("spare",), 8, "spare: .* the student gives nothing, since it is not called"),
    ],
)
def test_what_cannot_be_matched_is_said_with_the_layer(features, wide, words):
    student, teacher = net(1), net(5, width=wide)
    student.spare = teacher.spare = nn.Linear(2, 2)
    task = task_of(tn.Teacher(teacher, features=features), student)
    with pytest.raises(ValueError, match=words):
        Finetune(1)(Draft.of_model(student), task)
    assert not any(layer._forward_hooks for model in (student, teacher) for layer in model.modules())


def test_a_teacher_of_nothing_is_refused():
    for wrong in ({"mix": 0}, {"mix": 1.5}, {"temperature": 0}, {"features": "first", "weight": 0}):
        with pytest.raises(ValueError, match="a Teacher"):
            tn.Teacher(net(1), **wrong)


def test_positions_whose_target_is_ignored_have_no_soft_targets():
    generator = torch.Generator().manual_seed(0)
    outputs, wanted = torch.randn(2, 4, 7, 5, generator=generator)
    targets = torch.randint(0, 7, (4, 5), generator=generator)
    targets[:, 3:] = -100
    told = outputs[:, :, :3], wanted[:, :, :3]

    class Says(nn.Module):
        def __init__(self, what):
            super().__init__()
            self.what = nn.Parameter(what)

        def forward(self, x):
            return self.what

    task = task_of(tn.Teacher(Says(wanted), 1.0), Says(outputs))
    found = task.loss_of(task.model, task.train[0][:4], targets)
    assert found.item() == pytest.approx(soft_targets(*told, 1.0).item(), rel=1e-5)


def test_an_ensemble_that_is_sure_gives_a_finite_loss():
    sure = [nn.Linear(6, 3), nn.Linear(6, 3)]
    for k, layer in enumerate(sure):
        layer.weight.data.zero_()
        layer.bias.data = torch.eye(3)[k] * 500
    task = task_of(tn.Teacher(tuple(sure), 1.0))
    found = task.loss_of(task.model, *batch(task))
    found.backward()
    assert torch.isfinite(found) and all(torch.isfinite(p.grad).all() for p in task.model.parameters())


def test_training_towards_features_ends_in_the_same_bytes_at_any_number_of_threads():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            task = task_of(tn.Teacher(net(5), features=("first", "twice")))
            found.append(artifact_of(Finetune(2)(Draft.of_model(task.model), task)).to_bytes())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    other = replace(task, teacher=replace(task.teacher, weight=2.0))
    assert artifact_of(Finetune(2)(Draft.of_model(task.model), other)).to_bytes() != found[0]


def test_a_teacher_of_numbers_or_of_yes_and_no_is_followed_as_such():
    torch.manual_seed(0)
    x, (one, other, model) = torch.randn(6, 3), (nn.Linear(3, 3) for _ in range(3))
    teacher = tn.Teacher((one, other), temperature=2.0)
    with torch.no_grad():
        found, said = model(x), [one(x), other(x)]
    ones = (said[0] / 2).sigmoid() / 2 + (said[1] / 2).sigmoid() / 2
    for kind, expected in (
        ("gaussian", F.mse_loss(found, (said[0] + said[1]) / 2)),
        ("bernoulli", 4 * F.binary_cross_entropy((found / 2).sigmoid(), ones)),
    ):
        task = tn.Task(model, teacher=teacher, likelihood=kind)
        assert task.loss_of(model, x, None).item() == pytest.approx(expected.item(), rel=1e-5)
    single = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"along axis 1, which outputs \[6, 1\] have not: give Task\(likelihood"):
        tn.Task(single, teacher=single).loss_of(single, x, None)


@pytest.mark.parametrize("width", [1, 3])
def test_distilling_brings_a_network_of_numbers_back_to_its_teachers(width):
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, width))
    task = tn.Task(model, (x, x[:, :width] - 1), loss=lambda o, t: (o - t).square().mean())
    task = replace(task, schedule=tn.Schedule(batch=16))
    draft = Pack(KMeans(3))(Draft.of_model(model), task)
    both = draft, Distill(20, lr=0.1)(draft, task)
    lost = [float(F.mse_loss(d.module()(x), model(x))) for d in both]
    assert lost[1] < 0.5 * lost[0]


def test_distilling_refuses_classes_along_another_axis():
    words = torch.randint(0, 9, (64, 5))
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
    task = tn.Task(model, (words, words), loss=lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()))
    with pytest.raises(ValueError, match="classes along axis 1 of the outputs, but they lie along axis 2"):
        Distill(1)(Draft.of_model(model), task)
