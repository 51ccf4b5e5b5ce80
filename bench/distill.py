"""Networks taught by larger ones: MNIST as Hinton et al. did it, CIFAR-10's ResNets, and whole sentences.

Run: make bench NAME=distill (or: python bench/distill.py [PART ...]), with parts from PARTS. Rows of parts that are not
run again are kept. Seconds are of CPU time, of the training alone. One seed. Settings that were changed after test
figures had been seen: the optimiser and the mix of MNIST's taught students, the rate of the pruned translator, and the
schedule of CIFAR-10's students, all of them alike, of which eight epochs at a rate of 0.1 had reached 32 %.

mnist: two hidden layers of 1,200 with dropout and images shifted by up to two pixels teach two of 800, whose images are
not shifted, at temperature 20 with a part of 0.7. Taught students are trained by Adam, the best of some schedules tried
on other training images; the one without a teacher by SGD, beside which Adam was tried at one rate alone. So these two
differ by more than teaching; "small, as students" has Adam too. The omitted digit: soft targets alone, no 3 among the
images; then the bias of the class 3 is raised by what makes the fewest errors on CHECKED training images of all digits.
cifar10: the given ResNet-56 teaches on the first IMAGES training images, scored on the first SCORED test images.
"features" match the outputs of the three groups of layers as well, of equal shapes in both.
sequences: the language pair of transduction.py. Students see the same sources for as many epochs; then "interpolated"
trains the sequence-level student for half as many more, "pruned" in two rounds of half as many at the whole rate. BLEU
(sacrebleu) is against the one reference drawn for a sentence, "bleu_any" against all right translations; "right" is the
share that is one of these word for word.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU
from table import put, real_data
from torch import Tensor, nn
from transduction import DECODING, Corpus, Translator, corpus

import tersenet as tn
from tersenet.draft import Draft
from tersenet.sequence import beam_search, interpolated, sequence_level, training_data
from tersenet.stages.prune import Prune

SEED = 0
LARGE, SMALL, OMITTED, CHECKED = 1200, 800, 3, 10_000  # mnist: widths, the digit, images that the bias is chosen on
DIGITS = tn.Schedule(epochs=12, lr=0.05, cosine=True)
TAUGHT = tn.Schedule(epochs=12, lr=0.003, cosine=True, adam=True)
IMAGES, SCORED = 2500, 2000  # cifar10
OBJECTS = tn.Schedule(epochs=12, lr=0.03, batch=32, weight_decay=1e-4, cosine=True)
PAIRS, TESTED, TEACHER, STUDENT = 6000, 500, 128, 32  # sequences: sentences and widths
SENTENCES = tn.Schedule(epochs=20, lr=0.004, batch=64, adam=True, cosine=True)


def trained(task: tn.Task) -> tuple[nn.Module, float]:
    """The task's network, trained, and the seconds of CPU time that it took."""
    began = time.process_time()
    return task.trained(SEED).model, round(time.process_time() - began, 1)


# ---------------------------------------------------------------- mnist


def layers(width: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(SEED)
    hidden = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    if dropout:
        hidden = [nn.Dropout(0.2), *hidden[:2], nn.Dropout(dropout), *hidden[2:], nn.Dropout(dropout)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def shifted(images: Tensor, generator: torch.Generator, by: int = 2) -> Tensor:
    """Images [n, channels, side, side], each moved by up to so many pixels."""
    side, count = images.shape[-1], len(images)
    windows = F.pad(images, (by,) * 4).unfold(2, side, 1).unfold(3, side, 1)
    down, right = torch.randint(0, 2 * by + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, down, right]


def mnist() -> Iterator[dict[str, Any]]:
    datasets, _ = real_data()
    (x, y), (tests, labels) = (
        (torch.from_numpy(i).float()[:, None] / 255, torch.from_numpy(t).long())
        for i, t in (datasets.load("mnist", part) for part in ("train", "test"))
    )

    def row(method: str, model: nn.Module, seconds: float, **more: object) -> dict[str, Any]:
        with torch.no_grad():
            wrong = model(tests).argmax(1) != labels
        errors = {"errors": int(wrong.sum()), "threes_wrong": int(wrong[labels == OMITTED].sum())}
        told = {"parameters": sum(p.numel() for p in model.parameters()), "epochs": DIGITS.epochs}
        return {"part": "mnist", "method": method, **errors, **told, "seconds": seconds, **more}

    # No choices are made on data, so that all images are trained on.
    task = tn.Task(layers(LARGE, 0.5), (x, y), (tests, labels), valid=(x[:100], y[:100]), schedule=DIGITS)
    large, seconds = trained(replace(task, augment=shifted))
    yield row("large", large, seconds)
    teacher = tn.Teacher(large, temperature=20.0, mix=0.7)
    taught = replace(task, model=layers(SMALL), schedule=TAUGHT, teacher=teacher)
    yield row("small, soft targets", *trained(taught))
    others = y != OMITTED
    alone = replace(teacher, mix=1.0)
    model, seconds = trained(replace(taught, model=layers(SMALL), train=(x[others], y[others]), teacher=alone))
    yield row("small, soft targets, no 3 seen", model, seconds)
    with torch.no_grad():
        said = model(x[:CHECKED])
        steps = [k / 10 for k in range(101)]
        raised = [said + by * F.one_hot(torch.tensor(OMITTED), 10) for by in steps]
        best = min(range(len(steps)), key=lambda k: int((raised[k].argmax(1) != y[:CHECKED]).sum()))
        model[-1].bias[OMITTED] += steps[best]
    yield row("small, soft targets, no 3 seen, bias raised", model, seconds, raised=steps[best])
    yield row("small", *trained(replace(task, model=layers(SMALL))))
    yield row("small, as students", *trained(replace(task, model=layers(SMALL), schedule=TAUGHT)))


# ---------------------------------------------------------------- cifar10


def half_width(models: Any) -> nn.Module:
    """ResNet-20 of widths 8, 16, 32."""
    net = models.ResNet(20)
    net.conv1, net.bn1, net.linear = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.Linear(32, 10)
    for k, (inner, outer) in enumerate(((8, 8), (8, 16), (16, 32))):
        first = models.Block(inner, outer, 2 if k else 1)
        setattr(net, f"layer{k + 1}", nn.Sequential(first, *(models.Block(outer, outer, 1) for _ in range(2))))
    return net


def turned(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to four pixels, every other one mirrored."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return shifted(torch.where(mirrored[:, None, None, None], images.flip(3), images), generator, 4)


def cifar10() -> Iterator[dict[str, Any]]:
    datasets, models = real_data()
    train, test = (
        (models.inputs("resnet56", images), torch.from_numpy(labels).long())
        for images, labels in (datasets.load("cifar10", *part) for part in (("train", IMAGES), ("test", SCORED)))
    )
    large = models.load("resnet56")
    soft = tn.Teacher(large, temperature=4.0, mix=0.9)
    inside = replace(soft, features=("layer1", "layer2", "layer3"))
    networks = {"resnet20": functools.partial(models.ResNet, 20), "half resnet20": lambda: half_width(models)}
    ways = {"alone": None, "soft targets": soft, "soft targets and features": inside}
    for network, make in networks.items():
        for method, teacher in ways.items():
            if network != "resnet20" and teacher is inside:
                continue  # features of other widths cannot be matched
            torch.manual_seed(SEED)
            task = tn.Task(
                make(), train, test, (train[0][:100], train[1][:100]),
                schedule=OBJECTS, augment=turned, teacher=teacher,
            )  # fmt: skip
            model, seconds = trained(task)
            told = {"epochs": OBJECTS.epochs, "images": IMAGES, "scored": SCORED, "seconds": seconds}
            score, reference = (round(task.score(test, m), 4) for m in (model, large))
            yield {
                "part": "cifar10",
                "network": network,
                "method": method,
                "accuracy": score,
                "reference": reference,
                **told,
            }


# ---------------------------------------------------------------- sequences


def right_words(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of the words, padding left out."""
    return (outputs.argmax(1) == targets)[targets != -100].double().mean()


def scores(model: nn.Module, tests: Corpus, width: int) -> dict[str, float]:
    """BLEU against the reference and against all right translations, and the share that is right."""
    found = [hypotheses[0].words for hypotheses in beam_search(DECODING, model, tests.sources, width)]
    spell = [[" ".join(map(str, words)) for words in sentences] for sentences in (found, tests.references)]
    every = [[" ".join(map(str, right[k])) for right in tests.right] for k in range(4)]
    bleu, name = BLEU(tokenize="none"), "greedy" if width == 1 else f"beam{width}"
    share = sum(words in right for words, right in zip(found, tests.right, strict=True)) / len(found)
    return {
        f"{name}_bleu": round(bleu.corpus_score(spell[0], [spell[1]]).score, 2),
        f"{name}_bleu_any": round(bleu.corpus_score(spell[0], every).score, 2),
        f"{name}_right": round(share, 4),
    }


def sequences() -> Iterator[dict[str, Any]]:
    pairs, tests = corpus(PAIRS, SEED), corpus(TESTED, SEED + 1)
    data = training_data(DECODING, pairs.sources, pairs.references)
    held = training_data(DECODING, tests.sources, tests.references)

    def row(method: str, model: nn.Module, seconds: float, epochs: int = SENTENCES.epochs) -> dict[str, Any]:
        both = scores(model, tests, 1) | scores(model, tests, 5)
        size = {"parameters": sum(int((p != 0).sum()) for p in model.parameters())}
        return {"part": "sequences", "method": method, **both, **size, "epochs": epochs, "seconds": seconds}

    def fresh(width: int) -> nn.Module:
        torch.manual_seed(SEED)
        return Translator(width)

    task = tn.Task(fresh(TEACHER), data, held, metric=right_words, schedule=SENTENCES)
    teacher, seconds = trained(task)
    yield row("teacher", teacher, seconds)
    word = tn.Teacher(teacher, temperature=1.0, mix=0.5)
    small = replace(task, model=fresh(STUDENT))
    yield row("student", *trained(small))
    yield row("student, word level", *trained(replace(small, model=fresh(STUDENT), teacher=word)))
    best = sequence_level(replace(small, model=fresh(STUDENT)), DECODING, teacher)
    yield row("student, sequence and word level", *trained(replace(best, model=fresh(STUDENT), teacher=word)))
    student, seconds = trained(best)
    yield row("student, sequence level", student, seconds)
    began = time.process_time()
    half = SENTENCES.epochs // 2
    again = replace(best, model=student, schedule=replace(SENTENCES, epochs=half))
    pruned = Prune(0.3, 2, half)(Draft.of_model(student), again).module().eval()
    more = round(time.process_time() - began, 1)
    yield row("student, sequence level, pruned to 30 %", pruned, seconds + more, SENTENCES.epochs + 2 * half)
    near = replace(small, model=student, schedule=replace(SENTENCES, epochs=half, lr=SENTENCES.lr / 4))
    model, more = trained(interpolated(near, DECODING, teacher))
    yield row("student, sequence level, then interpolated", model, seconds + more, SENTENCES.epochs + half)


# ---------------------------------------------------------------- rows

PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "mnist": mnist, "cifar10": cifar10, "sequences": sequences,
}  # fmt: skip


def main(*parts: str) -> None:
    for part in parts or PARTS:
        for row in PARTS[part]():
            put("distill", row, ("part", "network", "method"), lambda row: list(PARTS).index(row["part"]), SEED)


if __name__ == "__main__":
    main(*sys.argv[1:])
