"""Networks with attention: of torch, by hand, with windows, caches of positions, masks and tied embeddings."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from networks.layers import Residual
from networks.zoo import LEARNT, TEST, chained, labelled, less, network, task, worded


def words_lost(outputs, targets):
    """Cross entropy of scores [samples, places, words]."""
    return F.cross_entropy(outputs.movedim(-1, 1), targets)


def perplexity():
    return less(lambda outputs, targets: words_lost(outputs, targets).exp(), over="split")


class Attention(nn.Module):
    """Self-attention by one projection and a product of heads."""

    def __init__(self, size, heads, mask=None):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(size, 3 * size), nn.Linear(size, size), heads
        self.register_buffer("mask", mask)

    def forward(self, x, bias=0.0):
        samples, places, size = x.shape
        q, k, v = self.qkv(x).view(samples, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias
        if self.mask is not None:
            scores = scores + self.mask[:places, :places]
        return self.out((scores.softmax(3) @ v).transpose(1, 2).reshape(samples, places, size))


def block(size, heads, mask=None):
    attend = Residual(nn.LayerNorm(size), Attention(size, heads, mask))
    return nn.Sequential(
        attend, Residual(nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
    )


class VisionTransformer(nn.Module):
    """Patches, a class token and positions as parameters of three axes, blocks, a head."""

    def __init__(self, size=32):
        super().__init__()
        self.patches = nn.Conv2d(3, size, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, size)), nn.Parameter(0.5 * torch.randn(1, 10, size))
        self.blocks, self.norm, self.head = block(size, 4), nn.LayerNorm(size), nn.Linear(size, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


@network(again=True)
def vision_transformer():
    return task(VisionTransformer(), labelled(3, 12, 12))


class Windows(nn.Module):
    """Attention in shifted windows of 3 x 3 places with a learnt bias for each offset (Swin)."""

    def __init__(self, size=24, heads=2, side=3, shift=1):
        super().__init__()
        self.side, self.shift, self.attend = side, shift, Attention(size, heads)
        self.table = nn.Parameter(0.5 * torch.randn((2 * side - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        offsets = at[:, :, None] - at[:, None] + side - 1
        self.register_buffer("index", offsets[0] * (2 * side - 1) + offsets[1])
        self.norm, self.wide = (
            nn.LayerNorm(size),
            Residual(nn.LayerNorm(size), nn.Linear(size, 48), nn.GELU(), nn.Linear(48, size)),
        )

    def forward(self, x):
        samples, height, width, size = x.shape
        s, rows, columns = self.side, height // self.side, width // self.side
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2)).view(samples, rows, s, columns, s, size)
        y = y.transpose(2, 3).reshape(-1, s * s, size)
        y = self.attend(y, self.table[self.index].permute(2, 0, 1))
        y = y.view(samples, rows, columns, s, s, size).transpose(2, 3).reshape(x.shape)
        return self.wide(x + torch.roll(y, (self.shift, self.shift), (1, 2)))


class Swin(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 24, 2, 2), nn.Sequential(Windows(shift=0), Windows())
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).permute(0, 2, 3, 1)).mean((1, 2)))


@network()
def swin():
    return task(Swin(), labelled(3, 12, 12))


class Convolving(nn.Module):
    """The Conformer's middle: a gated pointwise, a depthwise convolution, BatchNorm, pointwise."""

    def __init__(self, size):
        super().__init__()
        self.norm, self.wide = nn.LayerNorm(size), nn.Conv1d(size, 2 * size, 1)
        self.depth, self.batch = nn.Conv1d(size, size, 7, padding=3, groups=size), nn.BatchNorm1d(size)
        self.out = nn.Conv1d(size, size, 1)

    def forward(self, x):
        y = self.depth(F.glu(self.wide(self.norm(x).transpose(1, 2)), 1))
        return x + self.out(F.silu(self.batch(y))).transpose(1, 2)


class Halved(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, 48), nn.SiLU(), nn.Dropout(0.1), nn.Linear(48, size)
        )

    def forward(self, x):
        return x + 0.5 * self.body(x)


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(1)


@network(again=True)
def conformer():
    attend = Residual(nn.LayerNorm(24), Attention(24, 4))
    blocks = Halved(24), attend, Convolving(24), Halved(24), nn.LayerNorm(24)
    frames, kinds = labelled(12, 20)
    return task(nn.Sequential(nn.Linear(12, 24), *blocks, Pooled(), nn.Linear(24, 4)), (frames.transpose(1, 2), kinds))


class MultiHead(nn.Module):
    """nn.MultiheadAttention on embedded words."""

    def __init__(self):
        super().__init__()
        self.embed, self.attend, self.head = nn.Embedding(60, 32), nn.MultiheadAttention(32, 4), nn.Linear(32, 4)

    def forward(self, tokens):
        x = self.embed(tokens).transpose(0, 1)
        return self.head((x + self.attend(x, x, x)[0]).mean(0))


@network(bits=(4, 3))
def multihead_attention():
    return task(MultiHead(), worded(12, 60))


class Encoder(nn.Module):
    """nn.TransformerEncoder on words with a mask of padding, called with keywords."""

    def __init__(self, first=False):
        super().__init__()
        self.embed = nn.Embedding(60, 24, padding_idx=0)
        layer = nn.TransformerEncoderLayer(24, 4, 48, 0.1, batch_first=True, norm_first=first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(24, 4)

    def forward(self, tokens, padding):
        x = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        return self.head((x * ~padding[..., None]).sum(1) / (~padding).sum(1, keepdim=True))


def padded():
    tokens, kinds = worded(12, 60)
    padding = torch.arange(12) >= torch.randint(4, 13, (LEARNT + TEST, 1))
    return {"tokens": tokens.masked_fill(padding, 0), "padding": padding}, kinds


@network(again=True)
def transformer_encoder():
    return task(Encoder(), padded())


class Language(nn.Module):
    """A causal transformer: -inf above the diagonal in a buffer, embedding and head one tensor."""

    def __init__(self, words=48, size=32, places=16):
        super().__init__()
        self.embed, self.places = nn.Embedding(words, size), nn.Embedding(places, size)
        for table in (self.embed, self.places):
            nn.init.normal_(table.weight, std=0.2)
        mask = torch.full((places, places), -math.inf).triu(1)
        self.blocks = nn.Sequential(block(size, 2, mask), block(size, 2, mask))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


@network(classes=-1, again=True)
def causal_transformer():
    return task(Language(), chained(16, 48), words_lost, metric=perplexity(), likelihood="classes")


class Cross(nn.Module):
    """Words that look at frames of another size: three projections of their own shapes (kdim, vdim)."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(40, 32), nn.LayerNorm(32)
        self.attend = nn.MultiheadAttention(32, 4, kdim=20, vdim=28, batch_first=True)
        self.head = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 4))

    def forward(self, tokens, keys, values):
        x = self.embed(tokens)
        x = self.norm(x + self.attend(x, keys, values, need_weights=False)[0])
        return self.head(x.mean(1))


@network(bits=(4, 3))
def cross_attention():
    tokens, kinds = worded(8, 40)
    frames = torch.randn(4, 20)[kinds][:, None] + 0.8 * torch.randn(LEARNT + TEST, 10, 20)
    return task(Cross(), ((tokens, frames, F.pad(frames, (0, 8), value=0.5)), kinds))


class Transposed(nn.Module):
    """GPT-2's "Conv1D": x @ W + b with W [inputs, outputs]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


@network(bits=(4, 3))
def transposed_weights():
    wide = Residual(nn.LayerNorm(32), Transposed(32, 96), nn.GELU(), Transposed(96, 32))
    frames, kinds = labelled(16, 12)
    net = nn.Sequential(Transposed(16, 32), wide, Pooled(), nn.Linear(32, 4))
    return task(net, (frames.transpose(1, 2), kinds))


class Einsum(nn.Module):
    """Attention by einsum with parameters of four and three axes."""

    def __init__(self, size=24, heads=4):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, heads, size, size // heads) / math.sqrt(size))
        self.out = nn.Parameter(torch.randn(heads, size // heads, size) / math.sqrt(size))

    def forward(self, x):
        q, k, v = torch.einsum("bnd,shde->sbhne", x, self.qkv)
        scores = torch.einsum("bhne,bhme->bhnm", q, k) / math.sqrt(q.shape[-1])
        return x + torch.einsum("bhnm,bhme,hed->bnd", scores.softmax(3), v, self.out)


@network(again=True)
def einsum():
    frames, kinds = labelled(12, 16)
    net = nn.Sequential(nn.Linear(12, 24), Einsum(), nn.LayerNorm(24), Einsum(), Pooled(), nn.Linear(24, 4))
    return task(net, (frames.transpose(1, 2), kinds))


class Shared(nn.Module):
    """One block, used four times (ALBERT), with a factored embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.block, self.head = (
            nn.Embedding(60, 12),
            nn.Linear(12, 32),
            block(32, 4),
            nn.Linear(32, 4),
        )

    def forward(self, tokens):
        x = self.up(self.embed(tokens))
        for _ in range(4):
            x = self.block(x)
        return self.head(x.mean(1))


@network(bits=(4, 3))
def shared_blocks():
    return task(Shared(), worded(12, 60), lr=2e-3)


class RootMeanSquare(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Rotary(nn.Module):
    """A decoder's layer: rotated queries and keys, fewer keys than queries, gated linear units, no biases."""

    def __init__(self, size=32, heads=4, groups=2):
        super().__init__()
        self.heads, self.groups, self.each = heads, groups, size // heads
        self.q, self.kv = nn.Linear(size, size, bias=False), nn.Linear(size, 2 * groups * self.each, bias=False)
        self.o, self.norms = nn.Linear(size, size, bias=False), nn.ModuleList(RootMeanSquare(size) for _ in range(2))
        self.gate, self.up, self.down = (nn.Linear(i, o, bias=False) for i, o in ((size, 64), (size, 64), (64, size)))
        self.register_buffer("inv_freq", 1 / 100 ** (torch.arange(0, self.each, 2) / self.each))

    def turned(self, x):
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * self.inv_freq
        one, other = x.chunk(2, 3)
        return torch.cat([one * angle.cos() - other * angle.sin(), one * angle.sin() + other * angle.cos()], 3)

    def forward(self, x):
        y = self.norms[0](x)
        q = self.q(y).view(*y.shape[:2], self.heads, -1).transpose(1, 2)
        k, v = self.kv(y).view(*y.shape[:2], 2, self.groups, -1).permute(2, 0, 3, 1, 4)
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (self.turned(k), v))
        y = F.scaled_dot_product_attention(self.turned(q), k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(x.shape))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@network(classes=-1, bits=(4, 3))
def rotary_decoder():
    net = nn.Sequential(nn.Embedding(48, 32), Rotary(), RootMeanSquare(32), nn.Linear(32, 48, bias=False))
    return task(net, chained(12, 48), words_lost, metric=perplexity())


class Classifier(nn.Module):
    """As model hubs have them: named inputs, three embeddings added, outputs by name."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(80, 32), nn.Embedding(16, 32), nn.Embedding(2, 32)
        self.norm, self.block, self.pool = nn.LayerNorm(32), block(32, 4), nn.Linear(32, 32)
        self.classifier = nn.Linear(32, 4)

    def forward(self, input_ids, attention_mask, token_type_ids):
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.block(self.norm(self.words(input_ids) + self.places(places) + self.kinds(token_type_ids)))
        mask = attention_mask[..., None].to(x.dtype)
        pooled = torch.tanh(self.pool((x * mask).sum(1) / mask.sum(1)))
        return {"logits": self.classifier(pooled), "hidden": x}


@network(again=True)
def named_inputs_and_outputs():
    tokens, kinds = worded(16, 80)
    mask = (torch.arange(16) < torch.randint(6, 17, (len(tokens), 1))).long()
    second = (torch.arange(16) > 8).long().expand(len(tokens), -1)
    return task(Classifier(), ({"input_ids": tokens, "attention_mask": mask, "token_type_ids": second}, kinds))


@network(classes=-1, bits=(4, 3))
def tagging():
    """A class for each place, classes last; the loss moves axes."""
    tokens, following = chained(12, 40)
    body = nn.Embedding(40, 32), Residual(nn.LayerNorm(32), Attention(32, 4)), nn.Linear(32, 64), nn.ReLU()
    metric = less(lambda outputs, targets: (outputs.argmax(-1) != targets).double().mean())
    return task(nn.Sequential(*body, nn.Linear(64, 6)), (tokens, following % 6), words_lost, metric=metric)
