"""Sequence-level distillation of encoder-decoders (Kim, Rush 2016): beam search, and training data made of its finds.

An encoder-decoder is trained as any network: inputs are (sources, prefixes), outputs scores [n, vocabulary, length] of
each next word, targets [n, length] the words themselves and then -100, which `F.cross_entropy` and `Teacher` pass over.
So word-level distillation (section 3.1) is `Task(..., teacher=Teacher(network, temperature=1.0, mix=0.5))`.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from tersenet.data import Arrays, mapped, samples, split_of, tensors
from tersenet.task import HELD_OUT, Task, duplicate, spread
from tersenet.teacher import IGNORED

Sentence: TypeAlias = tuple[int, ...]  # numbers of words, without those that begin and end it
TOGETHER = 64  # sentences that are searched for together
ORDERS = 4  # of n-grams in BLEU


@dataclass(frozen=True)
class Decoding:
    """How an encoder-decoder writes sentences of at most `longest` words, one word after another.

    `encode(model, sources)` gives a state, any nest of tensors with sentences along axis 0. `step(model, state, words)`
    reads the last words [n] and gives scores of the next ones [n, vocabulary], before softmax, and the next state.
    `begin` and `end` are the numbers of the words that begin and end a sentence.
    """

    encode: Callable[[nn.Module, Any], Any]
    step: Callable[[nn.Module, Any, Tensor], tuple[Tensor, Any]]
    begin: int
    end: int
    longest: int


class Hypothesis(NamedTuple):
    """A sentence that a search found; its score is the log-probability, the end's included, by length^power."""

    words: Sentence
    score: float


def training_data(
    decoding: Decoding, sources: Any, sentences: Iterable[Sequence[int]]
) -> tuple[tuple[Any, Tensor], Tensor]:
    """((sources, prefixes), targets), both [n, length]: a sentence's words behind its prefixes, then its end."""
    rows = [torch.tensor([decoding.begin, *words, decoding.end]) for words in sentences]
    pad = torch.nn.utils.rnn.pad_sequence
    prefixes = pad([row[:-1] for row in rows], batch_first=True, padding_value=decoding.end)
    return (sources, prefixes), pad([row[1:] for row in rows], batch_first=True, padding_value=IGNORED)


def sentences_of(decoding: Decoding, targets: Tensor) -> list[Sentence]:
    """The sentences of targets [n, length], each up to its end."""
    rows = ([word for word in row if word != IGNORED] for row in targets.tolist())
    return [tuple(row[: row.index(decoding.end)] if decoding.end in row else row) for row in rows]


def beam_search(
    decoding: Decoding, model: nn.Module, sources: Any, width: int = 5, power: float = 1.0
) -> list[list[Hypothesis]]:
    """For each source at most `width` different sentences, the best first; width 1 takes the likeliest word each time.

    A search ends with `width` sentences. Scores are divided by length^power, the end counted, since without that short
    sentences win. Raises ValueError where the network's scores are not numbers.
    """
    if width < 1:
        raise ValueError(f"a beam has a width of 1 or more, not {width}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    shared = {id(p): p for p in model.parameters()}

    def search(batch: tuple[Any, Any]) -> list[list[Hypothesis]]:
        given = mapped(batch[0], lambda tensor: tensor.to(device))
        return _searched(decoding, duplicate(model, shared).eval(), given, width, power)

    every = Arrays(sources, None, torch.arange(samples(sources)))
    return [found for batch in spread(search, every.batches(TOGETHER)) for found in batch]


@torch.inference_mode()
def _searched(decoding: Decoding, model: nn.Module, sources: Any, width: int, power: float) -> list[list[Hypothesis]]:
    state, count = decoding.encode(model, sources), samples(sources)
    found: list[list[Hypothesis]] = [[] for _ in range(count)]
    words, total = torch.full((count,), decoding.begin), torch.zeros(count, 1)  # total [n, beams]: log-probabilities
    written = torch.zeros(count, 1, 0, dtype=torch.long)
    for length in range(1, decoding.longest + 2):
        scores, state = decoding.step(model, state, words.to(tensors(state)[0].device))
        grown = total[:, :, None] + scores.float().log_softmax(1).cpu().reshape(*total.shape, -1)
        if length > decoding.longest:  # all that is left to write is the end
            grown[:, :, torch.arange(grown.shape[2]) != decoding.end] = -math.inf
        best, place = grown.flatten(1).topk(min(2 * width, grown[0].numel()), 1)
        beam, word = place // grown.shape[2], place % grown.shape[2]
        ended = word == decoding.end
        counted = ended[:, :width] & best[:, :width].isfinite()  # others than the best may not end
        for k, j in counted.nonzero().tolist():
            if len(found[k]) < width:
                found[k].append(Hypothesis(tuple(written[k, beam[k, j]].tolist()), float(best[k, j]) / length**power))
        if length > decoding.longest or all(len(hypotheses) == width for hypotheses in found):
            break
        # At most one end follows each beam, so that as many as there were go on; an end among them is a dead beam.
        order = ended.int().sort(dim=1, stable=True).indices[:, :width]
        total, beam, word = (t.gather(1, order) for t in (best.masked_fill(ended, -math.inf), beam, word))
        rows = (torch.arange(count)[:, None] * grown.shape[1] + beam).flatten()
        written = torch.cat([written.flatten(0, 1)[rows].reshape(*word.shape, -1), word[:, :, None]], 2)
        words, state = word.flatten(), mapped(state, functools.partial(_rows, rows))
    if not all(found):
        raise ValueError("a beam search found no sentence: are the network's scores finite numbers?")
    return [sorted(hypotheses, key=lambda h: -h.score) for hypotheses in found]


def _rows(rows: Tensor, tensor: Tensor) -> Tensor:
    return tensor.index_select(0, rows.to(tensor.device))


def sentence_bleu(hypothesis: Sequence[int], reference: Sequence[int]) -> float:
    """Smoothed BLEU of a sentence, from 0 to 1: n-grams of two words and more count one more (Lin, Och 2004).

    >>> round(sentence_bleu((1, 2, 3, 4), (1, 2, 3, 5)), 3)
    0.658
    """
    logs = 0.0
    for n in range(1, ORDERS + 1):
        own, wanted = (Counter(zip(*(words[k:] for k in range(n)), strict=False)) for words in (hypothesis, reference))
        more = n > 1
        right, count = (own & wanted).total() + more, own.total() + more
        if not right:
            return 0.0
        logs += math.log(right / count) / ORDERS
    return math.exp(logs + min(0.0, 1 - len(reference) / len(hypothesis)))


def sequence_level(task: Task, decoding: Decoding, teacher: nn.Module, width: int = 5) -> Task:
    """The task with the teacher's best sentences to train on (Kim, Rush 2016, section 3.2).

    What choices are made on keeps its references, and so does the test split.
    """
    return _rewritten(task, decoding, teacher, width, lambda found, reference: found[0])


def interpolated(task: Task, decoding: Decoding, teacher: nn.Module, width: int = 35) -> Task:
    """The same with those of the teacher's sentences that are most like the references (section 3.3), by BLEU."""
    return _rewritten(
        task, decoding, teacher, width, lambda found, wanted: max(found, key=lambda h: sentence_bleu(h.words, wanted))
    )


def _rewritten(
    task: Task,
    decoding: Decoding,
    teacher: nn.Module,
    width: int,
    choice: Callable[[list[Hypothesis], Sentence], Hypothesis],
) -> Task:
    whole = split_of(task.train, "train")
    if not isinstance(whole, Arrays) or not isinstance(whole.inputs, tuple | list) or len(whole.inputs) != 2:
        raise ValueError("the teacher's sentences need sources in memory: give Task(train=training_data(...))")
    rest, held = (whole, whole) if task.valid is not None else whole.parted(HELD_OUT)
    (sources, _), targets = next(rest.batches(rest.count))
    found = beam_search(decoding, teacher, sources, width)
    chosen = [choice(*both).words for both in zip(found, sentences_of(decoding, targets), strict=True)]
    valid = next(held.batches(held.count)) if task.valid is None else task.valid
    return replace(task, train=training_data(decoding, sources, chosen), valid=valid)
