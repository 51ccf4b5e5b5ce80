"""LZW and context-tree weighting of integers, as Choi, El-Khamy, Lee (2018) compare them: whole coders in Python.

They are no codecs of the file: `bench/codes.py` has what they would make of it, and that is never the smallest.

LZW (Welch 1984): phrases of symbols, their numbers in as many bits as the last of them needs; the dictionary is full
with 2^16. Context-tree weighting (Willems, Shtarkov, Tjalkens 1995): each bit of a symbol, from the highest on, has for
each value of the bits above it a tree over the DEPTH bits of the symbols before, Krichevsky-Trofimov estimates in its
nodes and the weighted mean of all prunings of the tree as its probability, which a binary arithmetic coder codes.
"""

from collections.abc import Iterator, Sequence

FULL = 1 << 16
DEPTH = 10
LEAST, MOST = 1e-9, 1e9  # of a ratio of probabilities in a node


def lzw(symbols: Sequence[int], alphabet: int) -> bytes:
    """Symbols below `alphabet` as bytes."""
    phrases = {(-1, symbol): symbol for symbol in range(alphabet)}
    at, count, code, filled, out = -1, alphabet, 0, 0, bytearray()

    def put(number: int) -> None:
        nonlocal code, filled
        code |= number << filled
        filled += _width(count)
        while filled >= 8:
            out.append(code & 255)
            code, filled = code >> 8, filled - 8

    for symbol in symbols:
        if (at, symbol) in phrases:
            at = phrases[at, symbol]
            continue
        put(at)
        if count < FULL:
            phrases[at, symbol] = count
            count += 1
        at = symbol
    if at >= 0:
        put(at)
    return bytes(out + (bytes([code]) if filled else b""))


def unlzw(data: bytes, count: int, alphabet: int) -> list[int]:
    """The `count` symbols back."""
    phrases = [[symbol] for symbol in range(alphabet)]
    place, out, last = 0, list[int](), list[int]()
    while len(out) < count:
        width = _width(min(len(phrases) + bool(last), FULL))
        word = int.from_bytes(data[place // 8 : place // 8 + 4], "little") >> place % 8
        number, place = word & (1 << width) - 1, place + width
        phrase = phrases[number] if number < len(phrases) else [*last, last[0]]
        if last and len(phrases) < FULL:
            phrases.append([*last, phrase[0]])
        out += phrase
        last = phrase
    return out


def _width(count: int) -> int:
    return max(1, (count - 1).bit_length())


class _Trees:
    """What is known of the next bit: [zeros, ones, ratio of a node's own estimate to that of its children]."""

    def __init__(self, depth: int) -> None:
        self.depth, self.nodes = depth, dict[tuple[int, int, int], list[float]]()

    def chance(self, above: int, history: int) -> float:
        """The probability of a one after the bits `above` of the symbol and the bits of the symbols before."""
        self.path, chance = [], 0.5
        for depth in range(self.depth, -1, -1):
            node = self.nodes.setdefault((above, depth, history & (1 << depth) - 1), [0.0, 0.0, 1.0])
            own, below = (node[1] + 0.5) / (node[0] + node[1] + 1), chance
            chance = own if depth == self.depth else (node[2] * own + below) / (node[2] + 1)
            self.path.append((node, own, below))
        return chance

    def learn(self, bit: int) -> None:
        for number, (node, own, below) in enumerate(self.path):
            if number:
                ratio = own / below if bit else (1 - own) / (1 - below)
                node[2] = min(max(node[2] * ratio, LEAST), MOST)
            node[bit] += 1


def ctw(symbols: Sequence[int], alphabet: int, depth: int = DEPTH) -> bytes:
    """Symbols below `alphabet` as bytes."""
    low, high, out = 0, (1 << 32) - 1, bytearray()
    for split, bit in _bits(symbols, alphabet, depth):
        middle = low + ((high - low) * split >> 16)
        low, high = (low, middle) if bit else (middle + 1, high)
        while (low ^ high) >> 24 == 0:
            out.append(high >> 24)
            low, high = low << 8 & 0xFFFFFFFF, (high << 8 & 0xFFFFFFFF) | 255
    return bytes(out) + high.to_bytes(4, "big")


def _bits(symbols: Sequence[int], alphabet: int, depth: int) -> Iterator[tuple[int, int]]:
    """The share of a one in 2^-16, and the bit, of every bit of the symbols."""
    trees, width, history = _Trees(depth), _width(alphabet), 0
    for symbol in symbols:
        above = 1
        for place in range(width - 1, -1, -1):
            bit = symbol >> place & 1
            yield _share(trees.chance(above, history)), bit
            trees.learn(bit)
            above = above << 1 | bit
        history = (history << width | symbol) & (1 << depth) - 1


def unctw(data: bytes, count: int, alphabet: int, depth: int = DEPTH) -> list[int]:
    """The `count` symbols back."""
    trees, width, history, out = _Trees(depth), _width(alphabet), 0, list[int]()
    low, high, code, place = 0, (1 << 32) - 1, int.from_bytes(data[:4], "big"), 4
    for _ in range(count):
        above = 1
        for _ in range(width):
            middle = low + ((high - low) * _share(trees.chance(above, history)) >> 16)
            bit = int(code <= middle)
            low, high = (low, middle) if bit else (middle + 1, high)
            while (low ^ high) >> 24 == 0:
                low, high = low << 8 & 0xFFFFFFFF, (high << 8 & 0xFFFFFFFF) | 255
                code = (code << 8 & 0xFFFFFFFF) | (data[place] if place < len(data) else 0)
                place += 1
            trees.learn(bit)
            above = above << 1 | bit
        out.append(above - (1 << width))
        history = (history << width | out[-1]) & (1 << depth) - 1
    return out


def _share(chance: float) -> int:
    return min(max(int(chance * 65536), 1), 65535)
