"""A language pair made by rule, in which a sentence has four right translations, and LSTMs that translate.

A source sentence is 3 to 6 nouns, all different, each behind an adjective or not. A translation has an article, the
noun and its adjective for each. Which of two families all its words are from, and whether it turns the phrases' order
around (and puts adjectives behind nouns), is drawn once for a sentence: both as they are with probability 0.4, one of
them with 0.3 and 0.2, both changed with 0.1. The noun's gender decides the forms of article and adjective.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.sequence import Decoding

NOUNS, ADJECTIVES, ODDS = 24, 16, (0.4, 0.3, 0.2, 0.1)
SOURCE = 1 + NOUNS + ADJECTIVES  # 0 pads
BEGIN, END, ARTICLES, NAMES, QUALITIES = 0, 1, 2, 6, 6 + 2 * NOUNS
TARGET = QUALITIES + 4 * ADJECTIVES
LONGEST = 24
Phrase = tuple[int, int]  # a noun, and its adjective or -1


@dataclass(frozen=True)
class Corpus:
    """Sources [n, words] and for each its right translations, likeliest first; `drawn` is the reference's number."""

    sources: Tensor
    right: list[list[tuple[int, ...]]]
    drawn: list[int]

    @property
    def references(self) -> list[tuple[int, ...]]:
        return [right[number] for right, number in zip(self.right, self.drawn, strict=True)]


def corpus(count: int, seed: int) -> Corpus:
    """So many sentences; equal seeds give equal sentences."""
    rng, genders = np.random.default_rng(seed), np.random.default_rng(0).integers(0, 2, NOUNS)
    rows, right, drawn = [], [], []
    for _ in range(count):
        nouns = rng.choice(NOUNS, rng.integers(3, 7), replace=False)
        phrases = [(int(n), int(rng.integers(ADJECTIVES)) if rng.random() < 0.5 else -1) for n in nouns]
        words = [w for n, a in phrases for w in ([1 + NOUNS + a] if a >= 0 else []) + [1 + n]]
        rows.append(torch.tensor(words))
        right.append([translation(phrases, genders, family, order) for order in (0, 1) for family in (0, 1)])
        drawn.append(int(rng.choice(4, p=ODDS)))
    return Corpus(nn.utils.rnn.pad_sequence(rows, batch_first=True), right, drawn)


def translation(phrases: list[Phrase], genders: np.ndarray, family: int, order: int) -> tuple[int, ...]:
    words: list[int] = []
    for noun, adjective in phrases[::-1] if order else phrases:
        gender = int(genders[noun])
        name = [NAMES + 2 * noun + family]
        quality = [QUALITIES + 4 * adjective + 2 * gender + family] if adjective >= 0 else []
        words += [ARTICLES + 2 * gender + family, *((name + quality) if order else (quality + name))]
    return tuple(words)


class Translator(nn.Module):
    """A bidirectional LSTM that reads and one that writes, with attention (Luong, Pham, Manning 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sources, self.targets = nn.Embedding(SOURCE, width, padding_idx=0), nn.Embedding(TARGET, width)
        self.reader = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.writer = nn.LSTM(width, width, batch_first=True)
        self.query, self.both = nn.Linear(width, width, bias=False), nn.Linear(2 * width, width)
        self.last = nn.Linear(width, TARGET)

    def forward(self, sources: Tensor, prefixes: Tensor) -> Tensor:
        """Scores [n, words, length]."""
        out, _ = self.writer(self.targets(prefixes))
        return self.said(out, *self.read(sources)).transpose(1, 2)

    def read(self, sources: Tensor) -> tuple[Tensor, Tensor]:
        return self.reader(self.sources(sources))[0], sources != 0

    def said(self, out: Tensor, memory: Tensor, there: Tensor) -> Tensor:
        scores = self.query(out) @ memory.transpose(1, 2)
        weights = scores.masked_fill(~there[:, None], -torch.inf).softmax(2)
        return self.last(torch.tanh(self.both(torch.cat([out, weights @ memory], 2))))


def encode(model: Translator, sources: Tensor) -> tuple[Tensor, ...]:
    memory, there = model.read(sources)
    start = memory.new_zeros(len(memory), memory.shape[2])
    return memory, there, start, start


def step(model: Translator, state: tuple[Tensor, ...], words: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    memory, there, *held = state
    out, held = model.writer(model.targets(words)[:, None], tuple(part[None].contiguous() for part in held))
    return model.said(out, memory, there)[:, 0], (memory, there, *(part[0] for part in held))


DECODING = Decoding(encode, step, BEGIN, END, LONGEST)
