"""Parameters, active parameters and floating-point operations by formula, from a model's settings alone.

A model of a trillion weights is counted without allocating one of them, and without torch. Every formula takes the
settings of its model and a sequence length T, and returns the Count of each part; their sum is the model's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import singledispatch

from muonlab.errors import MuonlabError
from muonlab.settings.model import DecoderSettings, MoESettings, NanoGPTSettings


@dataclass(frozen=True)
class Count:
    """The size of one part of a model.

    parameters: numbers that are trained and stored.
    active: those that one token uses; of an embedding a single row.
    flops: floating-point operations of one training token, forward and backward: 6 per weight that it multiplies
        (PaLM, arXiv 2204.02311, appendix B); norms, activations and look-ups are left out, as is usual.
    """

    parameters: int = 0
    active: int = 0
    flops: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.parameters + other.parameters, self.active + other.active, self.flops + other.flops)

    def __mul__(self, times: int) -> "Count":
        return Count(self.parameters * times, self.active * times, self.flops * times)


def total(counts: Iterable[Count]) -> Count:
    """The sum of parts."""
    return sum(counts, Count())


@singledispatch
def model_counts(settings: object, length: int | None = None) -> dict[str, Count]:
    """The Count of every part of a model from its settings alone; nothing is allocated.

    `length` is the sequence length of the attention's operations, None for the model's context. A model adds its
    formula by `@model_counts.register`, for the class of its settings. Raises MuonlabError for settings without one.
    """
    name = getattr(settings, "name", type(settings).__name__)
    raise MuonlabError(f"model '{name}' has no formula for its counts; model_counts.register adds one")


def has_formula(settings: object) -> bool:
    """Whether `model_counts` can count a model of these settings."""
    return model_counts.dispatch(type(settings)) is not model_counts.dispatch(object)


@model_counts.register
def _nanogpt(s: NanoGPTSettings, length: int | None = None) -> dict[str, Count]:
    """Parts of NanoGPT: embedding, attention, dense, norms, head."""
    length = length or s.context
    attention = _multi_head(s, s.kv_heads, s.bias, length)
    dense = _mlp(s.d_model, s.mlp_hidden, gated=s.activation == "swiglu", bias=s.bias)
    return {**_ends(s), "attention": attention * s.num_layers, "dense": dense * s.num_layers}


@model_counts.register
def _moe(s: MoESettings, length: int | None = None) -> dict[str, Count]:
    """Parts of MoE: embedding, attention, dense, shared, routed, router, norms, head."""
    length = length or s.context
    layers = s.num_layers - s.num_dense_layers
    experts = s.routed_experts
    attention = (
        _latent(s, length) if s.attention == "mla" else _multi_head(s, s.num_heads, bias=False, length=length)
    )
    expert = _mlp(s.d_model, s.expert_hidden, gated=True)
    used = expert * s.experts_per_token
    return {
        **_ends(s),
        "attention": attention * s.num_layers,
        "dense": _mlp(s.d_model, s.dense_hidden, gated=True) * s.num_dense_layers,
        "shared": expert * (s.num_shared_experts * layers),
        "routed": Count(expert.parameters * experts, used.active, used.flops) * layers,
        "router": _weights(experts * s.d_model) * layers,
    }


def _weights(weights: int, others: int = 0) -> Count:
    """`weights` that every token multiplies, and `others` that it adds or scales by."""
    return Count(weights + others, weights + others, 6.0 * weights)


def _ends(s: DecoderSettings) -> dict[str, Count]:
    """Embedding, norms of the residual stream and head; a tied head adds no parameters and uses the embedding's."""
    table = s.vocabulary * s.d_model
    gains = (2 * s.num_layers + 1) * s.d_model * (s.norm == "rms")
    return {
        "embedding": Count(table, 0 if s.tied_head else s.d_model, 0.0),
        "norms": Count(gains, gains, 0.0),
        "head": Count(0 if s.tied_head else table, table, 6.0 * table),
    }


def _mlp(d_model: int, hidden: int, gated: bool, bias: bool = False) -> Count:
    inner = 2 if gated else 1  # maps to the hidden units
    return _weights((inner + 1) * d_model * hidden, (inner * hidden + d_model) * bias)


def _multi_head(s: DecoderSettings, num_kv_heads: int, bias: bool, length: int) -> Count:
    """Query, key, value and output maps, biases, gains of QK-norm, and the T x T square."""
    head_dim = s.d_model // s.num_heads
    rows = (s.num_heads + 2 * num_kv_heads) * head_dim  # of query, key and value
    weights = _weights(
        (rows + s.num_heads * head_dim) * s.d_model,
        (rows + s.d_model) * bias + 2 * head_dim * s.qk_norm,
    )
    return weights + _gate_and_sink(s, head_dim, bias) + _square(s.num_heads, head_dim, head_dim, length)


def _latent(s: MoESettings, length: int) -> Count:
    """Multi-head latent attention; the names are those of latent_attention.py."""
    heads, nope, rope, v = s.num_heads, s.qk_nope_head_dim, s.qk_rope_head_dim, s.v_head_dim
    query_in = s.q_lora_rank or s.d_model  # what query_up and query_rotary read
    weights = (
        s.q_lora_rank * s.d_model  # query_down
        + heads * (nope + rope) * query_in  # query_up, query_rotary
        + (s.kv_lora_rank + rope) * s.d_model  # kv_down, key_rotary
        + heads * (nope + v) * s.kv_lora_rank  # key_up, value_up
        + s.d_model * heads * v  # output
    )
    latents = s.q_lora_rank + s.kv_lora_rank  # gains of their norms
    return _weights(weights, latents) + _gate_and_sink(s, v) + _square(heads, nope + rope, v, length)


def _gate_and_sink(s: DecoderSettings, v_dim: int, bias: bool = False) -> Count:
    """The gate's map on the attention's output, a row for each head or for each of its v_dim entries, and the sinks."""
    rows = s.num_heads * {"none": 0, "head": 1, "element": v_dim}[s.attention_gate]
    return _weights(rows * s.d_model, rows * bias + s.num_heads * (s.attention_sink == "learnt"))


def _square(heads: int, qk_dim: int, v_dim: int, length: int) -> Count:
    """Logits (2 T H d) and weighted sum (2 T H d_v), three times with the backward, over the whole T x T square."""
    return Count(flops=6.0 * length * heads * (qk_dim + v_dim))
