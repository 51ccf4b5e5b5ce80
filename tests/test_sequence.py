"""Sequence-level distillation: beam search against all sentences, BLEU against sacrebleu, data that are made."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tersenet as tn
from tersenet.draft import Draft, artifact_of
from tersenet.sequence import (
    Decoding,
    beam_search,
    interpolated,
    sentence_bleu,
    sentences_of,
    sequence_level,
    training_data,
)
from tersenet.stages.finetune import Finetune
from tersenet.stages.prune import Prune

BEGIN, END, WORDS = 0, 1, 5


class Recurrent(nn.Module):
    """An LSTM that reads, and one that writes from its state."""

    def __init__(self, width=12):
        super().__init__()
        self.tokens, self.last = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.reader, self.writer = (nn.LSTM(width, width, batch_first=True) for _ in range(2))

    def forward(self, sources, prefixes):
        _, state = self.reader(self.tokens(sources))
        return self.last(self.writer(self.tokens(prefixes), state)[0]).transpose(1, 2)

    def encode(self, sources):
        return [part.transpose(0, 1) for part in self.reader(self.tokens(sources))[1]]

    def step(self, state, words):
        given = tuple(part.transpose(0, 1).contiguous() for part in state)
        out, state = self.writer(self.tokens(words[:, None]), given)
        return self.last(out[:, 0]), [part.transpose(0, 1) for part in state]


class Attentive(nn.Module):
    """A transformer; its state is what it has read and all words so far."""

    def __init__(self, width=16):
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, width), nn.Embedding(32, width)
        self.core = nn.Transformer(width, 2, 1, 1, 32, 0.1, batch_first=True)
        self.last = nn.Linear(width, WORDS)

    def placed(self, words):
        return self.tokens(words) + self.places(torch.arange(words.shape[1]))

    def forward(self, sources, prefixes):
        return self.written(self.core.encoder(self.placed(sources)), prefixes).transpose(1, 2)

    def written(self, memory, prefixes):
        mask = nn.Transformer.generate_square_subsequent_mask(prefixes.shape[1])
        return self.last(self.core.decoder(self.placed(prefixes), memory, mask))

    def encode(self, sources):
        return {"memory": self.core.encoder(self.placed(sources)), "words": sources[:, :0]}

    def step(self, state, words):
        words = torch.cat([state["words"], words[:, None]], 1)
        return self.written(state["memory"], words)[:, -1], {"memory": state["memory"], "words": words}


def decoding(longest=3):
    return Decoding(lambda m, sources: m.encode(sources), lambda m, s, w: m.step(s, w), BEGIN, END, longest)


def network(kind, seed=0):
    torch.manual_seed(seed)
    model = kind().eval()
    for parameter in model.parameters():
        parameter.data *= 2  # sentences of unlike probabilities
    return model


def sources(count, seed=0):
    return torch.randint(2, WORDS, (count, 4), generator=torch.Generator().manual_seed(seed))


def logs(model, source, words):
    """The log-probability of a sentence and its end, by the network's own forward pass."""
    (_, prefixes), targets = training_data(decoding(), source[None], [words])
    with torch.no_grad():
        said = model(source[None], prefixes).log_softmax(1)
    return float(said.gather(1, targets[:, None]).sum())


KINDS = pytest.mark.parametrize("kind", [Recurrent, Attentive])


@KINDS
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_beam_that_is_wide_enough_finds_every_sentence_in_order(kind, power):
    model, given = network(kind), sources(3)
    alphabet = [word for word in range(WORDS) if word != END]
    every = [s for n in range(4) for s in itertools.product(alphabet, repeat=n)]
    found = beam_search(decoding(), model, given, len(every), power)
    for source, hypotheses in zip(given, found, strict=True):
        scores = {words: logs(model, source, words) / (len(words) + 1) ** power for words in every}
        assert len(hypotheses) == len(every) and {h.words for h in hypotheses} == set(every)
        assert all(h.score == pytest.approx(scores[h.words], abs=1e-4) for h in hypotheses)
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)


@KINDS
def test_a_beam_of_one_takes_the_likeliest_word_each_time(kind):
    model, given = network(kind), sources(20)
    for source, (hypothesis,) in zip(given, beam_search(decoding(6), model, given, 1), strict=True):
        words = []
        while len(words) < 6:
            with torch.no_grad():
                word = int(model(source[None], torch.tensor([[BEGIN, *words]]))[0, :, -1].argmax())
            if word == END:
                break
            words.append(word)
        assert hypothesis.words == tuple(words)
        assert hypothesis.score == pytest.approx(logs(model, source, words) / (len(words) + 1), abs=1e-4)


@KINDS
def test_hypotheses_differ_and_do_not_hang_on_their_batch_or_on_threads_and_the_network_stays_as_it_was(kind):
    model, given, before = network(kind).train(), sources(150), torch.get_num_threads()
    found = beam_search(decoding(8), model, given, 4)
    assert model.training
    try:
        torch.set_num_threads(2)
        assert beam_search(decoding(8), model, given, 4) == found
    finally:
        torch.set_num_threads(before)
    for source, hypotheses in list(zip(given, found, strict=True))[::10]:
        assert 1 <= len(hypotheses) <= 4 and len({h.words for h in hypotheses}) == len(hypotheses)
        assert all(END not in h.words and len(h.words) <= 8 for h in hypotheses)
        (alone,) = beam_search(decoding(8), model, source[None], 4)
        assert [h.words for h in alone] == [h.words for h in hypotheses]


class Told(nn.Module):
    """Says the same of the next word whatever it has read."""

    def __init__(self, odds):
        super().__init__()
        self.odds = nn.Parameter(torch.tensor(odds))


def test_without_length_normalisation_short_sentences_win():
    # A sentence goes on with word 2 nine times of ten; no other word is possible.
    model = Told([0.0, 0.1, 0.9, 0.0, 0.0])
    told = Decoding(lambda m, s: s, lambda m, s, w: (m.odds.log().expand(len(w), -1), s), BEGIN, END, 6)
    for power, best in ((0.0, ()), (1.0, (2,) * 6)):
        assert beam_search(told, model, sources(1), 8, power)[0][0].words == best
    hypotheses = beam_search(told, model, sources(1), 8)[0]
    assert {h.words for h in hypotheses} == {(2,) * n for n in range(7)}


def test_scores_that_are_not_numbers_and_beams_of_nothing_are_errors():
    model = Told([float("nan")] * WORDS)
    told = Decoding(lambda m, s: s, lambda m, s, w: (m.odds.expand(len(w), -1), s), BEGIN, END, 3)
    with pytest.raises(ValueError, match="found no sentence"):
        beam_search(told, model, sources(2))
    with pytest.raises(ValueError, match="width of 1 or more"):
        beam_search(told, model, sources(2), 0)


SENTENCES = st.lists(st.integers(0, 3), max_size=9).map(tuple)


@settings(max_examples=200, deadline=None)
@given(SENTENCES, SENTENCES.filter(bool))
def test_smoothed_bleu_of_a_sentence_is_that_of_sacrebleu(hypothesis, reference):
    sacrebleu = pytest.importorskip("sacrebleu")
    told, wanted = (" ".join(f"w{word}" for word in words) for words in (hypothesis, reference))
    found = sacrebleu.sentence_bleu(
        told, [wanted], smooth_method="add-k", smooth_value=1, tokenize="none", use_effective_order=False
    )
    assert 100 * sentence_bleu(hypothesis, reference) == pytest.approx(found.score, abs=1e-6)


@given(st.lists(st.lists(st.integers(2, 9), max_size=7).map(tuple), min_size=1, max_size=5))
def test_sentences_come_back_from_training_data(sentences):
    how, given = decoding(), torch.zeros(len(sentences), 1)
    (same, prefixes), targets = training_data(how, given, sentences)
    assert same is given and sentences_of(how, targets) == sentences and prefixes.shape == targets.shape
    for row, words in enumerate(sentences):
        assert prefixes[row, : len(words) + 1].tolist() == [BEGIN, *words]
        assert targets[row].tolist() == [*words, END] + [-100] * (targets.shape[1] - len(words) - 1)


def right(outputs, targets):
    """The share of the words, paddings left out."""
    return (outputs.argmax(1) == targets)[targets != -100].double().mean()


def copying(model, count=300):
    """A task: to write what was read, or, as likely, its mirror image."""
    given, mirrored = sources(count), torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.5
    wanted = torch.where(mirrored[:, None], given.flip(1), given)
    data = training_data(decoding(), given, wanted.tolist())
    return tn.Task(model, data, data, metric=right, schedule=tn.Schedule(3, 0.01, 32, adam=True))


def test_training_data_are_the_teachers_sentences_and_references_stay_where_choices_are_made():
    how, task, teacher = decoding(5), copying(network(Recurrent)), network(Recurrent, 3)
    made = sequence_level(task, how, teacher)
    (given, _), targets = made.train
    found = beam_search(how, teacher, given, 5)
    assert sentences_of(how, targets) == [hypotheses[0].words for hypotheses in found]
    ((held, _), references), ((own, _), true) = next(task.held().batches(99)), made.valid
    assert torch.equal(held, own) and torch.equal(references, true) and len(given) + len(own) == 300
    near = interpolated(task, how, teacher, 12)
    whole = replace(task, valid=task.test)
    near = interpolated(whole, how, teacher, 12)
    assert torch.equal(near.train[0][0], task.train[0][0]) and torch.equal(near.valid[1], task.test[1])
    wanted, written = (sentences_of(how, data[1]) for data in (task.train, near.train))
    wide = beam_search(how, teacher, task.train[0][0], 12)
    for reference, words, hypotheses in zip(wanted, written, wide, strict=True):
        assert words in [h.words for h in hypotheses]
        assert sentence_bleu(words, reference) == max(sentence_bleu(h.words, reference) for h in hypotheses)
    assert written != [hypotheses[0].words for hypotheses in wide]


def test_data_that_cannot_be_rewritten_are_refused():
    how, task = decoding(), copying(network(Recurrent), 8)
    for train in ([task.train], (task.train[0][0], task.train[1])):
        with pytest.raises(ValueError, match=r"need sources in memory: give Task\(train=training_data"):
            sequence_level(replace(task, train=train), how, task.model)


@KINDS
def test_stages_train_on_words_and_on_sentences_of_a_teacher_to_the_same_bytes(kind):
    how, teacher = decoding(5), network(kind, 3)
    task = copying(network(kind))
    word = replace(task, teacher=tn.Teacher(teacher, 1.0, 0.5))
    found = []
    for taught in (task, word, sequence_level(task, how, teacher)):
        twice = []
        for _ in range(2):
            draft = Draft.of_model(task.model)
            for stage in (Prune(0.5, 1), Finetune(1)):
                draft = stage(draft, taught)
            twice.append(artifact_of(draft).to_bytes())
        assert twice[0] == twice[1]
        found.append(twice[0])
    assert len(set(found)) == 3


def test_a_student_taught_whole_sentences_says_greedily_what_its_teachers_search_finds():
    how = decoding(5)
    task = copying(network(Recurrent))
    teacher = replace(task, schedule=tn.Schedule(30, 0.01, 32, adam=True)).trained().model
    student = replace(sequence_level(task, how, teacher), schedule=tn.Schedule(40, 0.01, 32, adam=True)).trained().model
    given = sources(60, seed=5)
    goal, found = (beam_search(how, model, given, width) for model, width in ((teacher, 5), (student, 1)))
    same = sum(g[0].words == f[0].words for g, f in zip(goal, found, strict=True))
    assert same > 45
