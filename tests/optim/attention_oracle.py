"""Attention layers of every layout in fp64 with materialised logits, for the QK-Clip tests to measure."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim.qk_clip import QKClip

NAME = "layer_00"
WIDTH = 12


@dataclass
class OracleLayer:
    """`logits(x)`: (batch, heads, T, T) scaled q.k before mask and softmax. `bystanders` must never move."""

    layout: AttentionLayout
    logits: Callable[[Tensor], Tensor]
    bystanders: list[nn.Parameter]

    @property
    def weights(self) -> list[nn.Parameter]:
        """Every declared weight, once."""
        blocks = (*self.layout.query, *self.layout.key, *self.layout.query_shared_key)
        return list({id(block.parameter): block.parameter for block in blocks}.values())

    def max_logits(self, x: Tensor, absolute: bool = False) -> Tensor:
        """(1, heads), the maximum over the batch and causal pairs."""
        with torch.no_grad():
            logits = self.logits(x)
        logits = logits.abs() if absolute else logits
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        return logits.masked_fill(future, -torch.inf).amax((0, 2, 3))[None]

    def attention(self, x: Tensor) -> Tensor:
        """(batch, heads, T, T) causal softmax."""
        with torch.no_grad():
            logits = self.logits(x)
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        return logits.masked_fill(future, -torch.inf).softmax(-1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def heads_of(rows: Tensor, heads: int) -> Tensor:
    """(batch, T, heads * dim) to (batch, heads, T, dim)."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def products(q: Tensor, k: Tensor) -> Tensor:
    """Scaled products of (batch, heads, T, dim) queries with as many or fewer key heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return q @ k.mT / q.shape[-1] ** 0.5


def rotate(rows: Tensor, rotary_dim: int) -> Tensor:
    """Rotary embedding of the first `rotary_dim` entries of (batch, heads, T, dim)."""
    time = torch.arange(rows.shape[2], dtype=rows.dtype)
    angle = time[:, None] * 10000 ** -torch.linspace(0, 1, rotary_dim // 2, dtype=rows.dtype)
    a, b, rest = rows.split([rotary_dim // 2, rotary_dim // 2, rows.shape[-1] - rotary_dim], -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def separate(
    heads: int, kv_heads: int, dim: int, rotary_dim: int = 0, bias: bool = False, name: str = NAME
) -> OracleLayer:
    """One matrix each for Q, K and V: MHA, GQA and MQA, with or without (partial) rotary and biases."""
    q, k, v = (
        parameter(heads * dim, WIDTH),
        parameter(kv_heads * dim, WIDTH),
        parameter(kv_heads * dim, WIDTH),
    )
    query, key = (HeadRows(q, dim),), (HeadRows(k, dim),)
    q_bias, k_bias = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if bias:
        q_bias, k_bias = parameter(heads * dim), parameter(kv_heads * dim)
        query, key = (*query, HeadRows(q_bias, dim)), (*key, HeadRows(k_bias, dim))

    def logits(x: Tensor) -> Tensor:
        queries, keys = heads_of(x @ q.mT + q_bias, heads), heads_of(x @ k.mT + k_bias, kv_heads)
        return products(rotate(queries, rotary_dim), rotate(keys, rotary_dim))

    return OracleLayer(AttentionLayout(name, heads, kv_heads, query, key), logits, [v])


def fused(heads: int, kv_heads: int, dim: int) -> OracleLayer:
    """One matrix and one bias [all Q | all K | all V], described by offsets."""
    q_rows, k_rows = heads * dim, kv_heads * dim
    weight, bias = parameter(q_rows + 2 * k_rows, WIDTH), parameter(q_rows + 2 * k_rows)
    layout = AttentionLayout(
        NAME,
        heads,
        kv_heads,
        query=(HeadRows(weight, dim), HeadRows(bias, dim)),
        key=(HeadRows(weight, dim, offset=q_rows), HeadRows(bias, dim, offset=q_rows)),
    )

    def logits(x: Tensor) -> Tensor:
        q, k, _ = (x @ weight.mT + bias).split([q_rows, k_rows, k_rows], -1)
        return products(heads_of(q, heads), heads_of(k, kv_heads))

    return OracleLayer(layout, logits, [])


def interleaved(heads: int, dim: int) -> OracleLayer:
    """One matrix of per-head triples [q_0 k_0 v_0 q_1 k_1 v_1 ...], described by the stride (GPT-NeoX)."""
    weight = parameter(3 * heads * dim, WIDTH)
    layout = AttentionLayout(
        NAME,
        heads,
        heads,
        query=(HeadRows(weight, dim, stride=3 * dim),),
        key=(HeadRows(weight, dim, offset=dim, stride=3 * dim),),
    )

    def logits(x: Tensor) -> Tensor:
        q, k, _ = (x @ weight.mT).unflatten(-1, (heads, 3, dim)).transpose(1, 2).unbind(3)
        return products(q, k)

    return OracleLayer(layout, logits, [])


def columns(heads: int, kv_heads: int, dim: int) -> OracleLayer:
    """Weights kept as (in, out), x @ W, so that a head owns columns (GPT-2's Conv1D, JAX)."""
    q, k = parameter(WIDTH, heads * dim), parameter(WIDTH, kv_heads * dim)
    layout = AttentionLayout(
        NAME, heads, kv_heads, query=(HeadRows(q, dim, dim=1),), key=(HeadRows(k, dim, dim=-1),)
    )
    return OracleLayer(layout, lambda x: products(heads_of(x @ q, heads), heads_of(x @ k, kv_heads)), [])


@dataclass
class LatentLayer(OracleLayer):
    """Multi-head latent attention; `absorbed(x)` are the same logits with W_uk folded into the query."""

    absorbed: Callable[[Tensor], Tensor]


def latent(heads: int, nope: int, rope: int, value: int = 3, rank: int = 5) -> LatentLayer:
    """MLA after DeepSeek-V2: a head has q = [nope | rope], [k_nope | v]; one rotary key serves all heads."""
    q_up = parameter(heads * (nope + rope), WIDTH)
    kv_down, kv_up = parameter(rank, WIDTH), parameter(heads * (nope + value), rank)
    k_rope = parameter(rope, WIDTH)
    layout = AttentionLayout(
        NAME,
        heads,
        heads,
        query=(HeadRows(q_up, nope, stride=nope + rope),),
        key=(HeadRows(kv_up, nope, stride=nope + value),),
        query_shared_key=(HeadRows(q_up, rope, offset=nope, stride=nope + rope),),
    )

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q_nope, q_rope = heads_of(x @ q_up.mT, heads).split([nope, rope], -1)
        w_uk = kv_up.unflatten(0, (heads, nope + value))[:, :nope]
        shared = rotate(q_rope, rope) @ rotate((x @ k_rope.mT)[:, None], rope).mT
        return q_nope, w_uk, x @ kv_down.mT, shared

    def logits(x: Tensor) -> Tensor:
        q_nope, w_uk, c, shared = parts(x)
        k_nope = torch.einsum("btr,hnr->bhtn", c, w_uk)
        return (q_nope @ k_nope.mT + shared) / (nope + rope) ** 0.5

    def absorbed(x: Tensor) -> Tensor:
        q_nope, w_uk, c, shared = parts(x)
        return (torch.einsum("bhtn,hnr->bhtr", q_nope, w_uk) @ c[:, None].mT + shared) / (nope + rope) ** 0.5

    return LatentLayer(layout, logits, [kv_down, k_rope], absorbed)


def flat_layout(heads: int = 2, kv_heads: int = 2, name: str = NAME, dtype=torch.float64) -> AttentionLayout:
    """Heads of two rows and three columns, all entries 1, so that the factors can be read off."""
    q, k = (nn.Parameter(torch.ones(2 * h, 3, dtype=dtype)) for h in (heads, kv_heads))
    return AttentionLayout(name, heads, kv_heads, (HeadRows(q, 2),), (HeadRows(k, 2),))


def factors(layout: AttentionLayout) -> tuple[Tensor, Tensor]:
    """The query's and the key's factor per head, of a flat layout."""
    return tuple(blocks[0].parameter.detach()[::2, 0] for blocks in (layout.query, layout.key))


def clip_once(layout: AttentionLayout, maxima: list[float], **clip_settings: object) -> Tensor:
    qk_clip = QKClip([layout], **clip_settings)
    qk_clip.observe(torch.tensor(maxima, dtype=torch.float64)[None])
    return qk_clip.apply(0)


def by_layer(*layers: Tensor) -> Tensor:
    """(layers, heads) from each layer's (heads,), NaN where a layer has fewer: what is there must not be read."""
    return nn.utils.rnn.pad_sequence(layers, batch_first=True, padding_value=torch.nan)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
