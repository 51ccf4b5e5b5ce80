"""The coders that bench/codes.py compares with: what they say a size is, is a size from which the symbols come back."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from universal_coders import ctw, lzw, unctw, unlzw

CODERS = {"LZW": (lzw, unlzw), "context-tree weighting": (ctw, unctw)}


@pytest.mark.parametrize("name", CODERS)
@settings(deadline=None, max_examples=60)
@given(symbols=st.lists(st.integers(0, 40), max_size=200), more=st.integers(0, 300))
def test_symbols_come_back(name, symbols, more):
    encode, decode = CODERS[name]
    alphabet = 1 + max(symbols, default=0) + more
    assert decode(encode(symbols, alphabet), len(symbols), alphabet) == symbols


@pytest.mark.parametrize("name", CODERS)
def test_long_and_skewed_rows_of_symbols_come_back_from_about_their_entropy(name):
    encode, decode = CODERS[name]
    share = np.array([0.85, 0.1, 0.03, 0.02])
    symbols = np.random.default_rng(0).choice(4, 20_000, p=share).tolist()
    data = encode(symbols, 4)
    assert decode(data, len(symbols), 4) == symbols
    entropy = -20_000 * float((share * np.log2(share)).sum()) / 8
    assert entropy * 0.97 < len(data) < entropy * (1.05 if name != "LZW" else 1.35)


def test_a_dictionary_that_is_full_stays_as_it_is():
    symbols = np.random.default_rng(1).integers(0, 256, 150_000).tolist()
    data = lzw(symbols, 256)
    assert unlzw(data, len(symbols), 256) == symbols and len(data) > math.prod((65_536, 15)) // 8


def test_a_tree_of_contexts_finds_what_symbols_hang_on():
    rng = np.random.default_rng(2)
    symbols = [0, 1]
    for noise in (rng.random(6000) < 0.02).tolist():
        symbols.append(symbols[-2] ^ symbols[-1] ^ noise)  # looks random to what counts symbols alone
    assert len(ctw(symbols, 2)) < 0.25 * len(symbols) / 8
