"""Causal self-attention whose exact per-head max logit is always known.

Shape legend: B batch, T positions, D model width, H query heads, K key-value heads, d head_dim.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.layout import AttentionLayout, HeadRows, ParameterRole
from muonlab.models.explicit_attention import attention_entropy, explicit_attention, one_hot_share
from muonlab.models.flex import flex_supports
from muonlab.models.fused_attention import fused_attention
from muonlab.models.max_logits import LayerLogits
from muonlab.models.norm import RMSNorm
from muonlab.settings.model import rotary_dim

# Up to this context explicit attention is the faster of the two on a CPU, and its extremes cost nothing more
# (`make bench-step` measures both).
EXPLICIT_CONTEXT = 128


class AttentionOutput(NamedTuple):
    """`x` (B, T, D); `logits` in training mode only; `entropy` in nats and `one_hot`, each (H,), on request."""

    x: Tensor
    logits: LayerLogits | None
    entropy: Tensor | None = None
    one_hot: Tensor | None = None


def rotary_tables(head_dim: int, context: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of RoPE (arXiv 2104.09864, eq. 34), each (context, head_dim), halves paired.

    The sign of the rotation is folded into the sine so that a rotation is x * cos + roll(x) * sin.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), 1).float(), torch.cat((-sin, sin), 1).float()


def head_rows(linear: nn.Linear, rows: int, offset: int = 0) -> tuple[HeadRows, ...]:
    """Heads that lie side by side in the weight of a map and in its bias, if it has one."""
    parameters = (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)
    return tuple(HeadRows(cast(nn.Parameter, p), rows=rows, offset=offset) for p in parameters)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation: three passes, where autograd makes six."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return torch.addcmul(grad * cos, grad.roll(grad.shape[-1] // 2, -1), sin, value=-1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, heads, d) by its positions; `cos` and `sin` are (T, 1, d)."""
    return _Rotate.apply(x, cos, sin)


def output_gate(kind: str, d_model: int, num_heads: int, v_dim: int, bias: bool = False) -> nn.Linear | None:
    """W of `gated`: a row for each "head", or for each "element" of its output; None for "none"."""
    if kind == "none":
        return None
    return nn.Linear(d_model, num_heads * (v_dim if kind == "element" else 1), bias=bias)


def gated(out: Tensor, gate: nn.Linear | None, x: Tensor) -> Tensor:
    """out * sigmoid(W x), heads side by side: (B, T, H, d_v) and the attention's input (B, T, D) -> (B, T, H d_v).

    Gated attention (arXiv 2505.06708, eq. 5 at position G1, before the output map). Without a gate `out` as it is.
    """
    if gate is not None:
        out = out * torch.sigmoid(gate(x)).unflatten(-1, (out.shape[2], -1))
    return out.flatten(2)


def add_sink(attention: nn.Module, kind: str, num_heads: int) -> None:
    """Give a module its `sink` (H,): a parameter that starts at 0 ("learnt"), zeros ("zero") or None ("none").

    A zero adds 1 to the denominator of every softmax.
    """
    if kind == "zero":
        attention.register_buffer("sink", torch.zeros(num_heads), persistent=False)
    else:
        attention.register_parameter(
            "sink", nn.Parameter(torch.zeros(num_heads)) if kind == "learnt" else None
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    soft_cap: float = 0.0,
    forced_max: float = 0.0,
    softmax_dtype: torch.dtype = torch.float32,
    documents: Tensor | None = None,
    sink: Tensor | None = None,
    measure_weights: bool = False,
) -> tuple[Tensor, LayerLogits, Tensor | None]:
    """Attention by the fastest suitable kernel: output (B, H, T, d_v), its logits, and its weights or None.

    The arguments are those of `explicit_attention`, which runs for the weights (B, H, T, T), soft-cap, forced
    maxima and a softmax below fp32, on a CPU up to EXPLICIT_CONTEXT, and for a sink where the kernel of a GPU does not
    say how much weight a row had; `fused_attention` runs otherwise.
    """
    short = q.device.type == "cpu" and q.shape[2] <= EXPLICIT_CONTEXT
    blind = sink is not None and q.device.type != "cpu" and not flex_supports(q, v)
    if measure_weights or soft_cap or forced_max or short or blind or softmax_dtype is not torch.float32:
        out, weights, extremes = explicit_attention(
            q, k, v, soft_cap, forced_max, documents, softmax_dtype, sink
        )
        return out, LayerLogits(extremes), weights if measure_weights else None
    return *fused_attention(q, k, v, documents, sink), None


class Attention(nn.Module):
    """Multi-head, grouped-query (num_kv_heads < num_heads) or multi-query (num_kv_heads = 1) attention.

    fused_qkv: query, key and value are one weight `qkv` of (H + 2 K) d rows; otherwise three matrices, which Muon
        orthogonalises separately.
    soft_cap: c of c tanh(s/c) on the logits; 0: none.
    rotary_fraction: the share of each head's entries, the first ones, that RoPE rotates; 1: all, 0: no positions.
    forced_max: kappa > 0 forces every head's largest |logit| over the batch, later tokens included, to kappa; 0: off.
        An experiment on what large logits do by themselves, not a model to use.
    softmax_dtype: the name of the dtype to which the logits are rounded and in which their softmax is taken: an
        experiment on its precision (arXiv 2510.04212).
    gate: "head" or "element" (`gated`), or "none". sink: "zero" or "learnt" (`add_sink`), or "none".

    `NanoGPTSettings` checks that the sizes fit each other.
    """

    sink: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        bias: bool = False,
        fused_qkv: bool = False,
        qk_norm: bool = False,
        soft_cap: float = 0.0,
        rotary_fraction: float = 1.0,
        forced_max: float = 0.0,
        softmax_dtype: str = "float32",
        gate: str = "none",
        sink: str = "none",
    ):
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, d_model // num_heads
        self.soft_cap, self.forced_max = soft_cap, forced_max
        self.softmax_dtype = getattr(torch, softmax_dtype)
        self.rotary_dim = rotary_dim(self.head_dim, rotary_fraction)
        query_rows, key_rows = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.fused = fused_qkv
        if fused_qkv:
            self.qkv = nn.Linear(d_model, query_rows + 2 * key_rows, bias=bias)
        else:
            self.query = nn.Linear(d_model, query_rows, bias=bias)
            self.key = nn.Linear(d_model, key_rows, bias=bias)
            self.value = nn.Linear(d_model, key_rows, bias=bias)
        self.output = nn.Linear(num_heads * self.head_dim, d_model, bias=bias)
        self.gate = output_gate(gate, d_model, num_heads, self.head_dim, bias)
        add_sink(self, sink, num_heads)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        measure_entropy: bool = False,
        documents: Tensor | None = None,
    ) -> AttentionOutput:
        """x (B, T, D) with rotary tables (T, 1, d); `documents` (B, T) int64, None: one per sequence."""
        q, k, v = self.project(x, cos, sin)
        out, logits, weights = attend(
            q,
            k,
            v,
            soft_cap=self.soft_cap,
            forced_max=self.forced_max,
            softmax_dtype=self.softmax_dtype,
            documents=documents,
            sink=self.sink,
            measure_weights=measure_entropy,
        )
        x = self.output(gated(out.transpose(1, 2), self.gate, x))
        shape = () if weights is None else (attention_entropy(weights), one_hot_share(weights))
        return AttentionOutput(x, logits if self.training else None, *shape)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), keys and values (B, K, T, d), normalised and rotated.

        One product for the three matrices and one rotation for queries and keys: at small widths a step is
        overhead more than arithmetic.
        """
        if self.fused:
            qkv = self.qkv(x)
        else:
            projections = (self.query, self.key, self.value)
            bias = None if self.query.bias is None else torch.cat([p.bias for p in projections])
            qkv = F.linear(x, torch.cat([p.weight for p in projections]), bias)
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = qk.split((self.num_heads, self.num_kv_heads), dim=2)
            qk = torch.cat((self.query_norm(q), self.key_norm(k)), dim=2)
        if self.rotary_dim == self.head_dim:
            qk = rotate(qk, cos, sin)
        elif self.rotary_dim:
            turned, still = qk.split((self.rotary_dim, self.head_dim - self.rotary_dim), dim=-1)
            qk = torch.cat((rotate(turned, cos, sin), still), -1)
        qk = qk.to(v.dtype)  # under autocast the rotation is in fp32; kernels multiply one dtype
        q, k = qk.split((self.num_heads, self.num_kv_heads), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def layout(self, name: str) -> AttentionLayout:
        """Which rows make each head's query and key; inert under QK-norm, which undoes any scaling of them."""

        if self.fused:
            query = head_rows(self.qkv, self.head_dim)
            key = head_rows(self.qkv, self.head_dim, offset=self.num_heads * self.head_dim)
        else:
            query, key = head_rows(self.query, self.head_dim), head_rows(self.key, self.head_dim)

        inert = (
            "QK-norm normalises queries and keys after these weights"
            if self.query_norm is not None
            else "forced_max_logit sets the logits whatever these weights are"
            if self.forced_max
            else ""
        )
        return AttentionLayout(name, self.num_heads, self.num_kv_heads, query, key, inert=inert)

    def roles(self) -> dict[str, ParameterRole]:
        """The role of each parameter by its name within this module."""
        heads = {
            "query": self.num_heads,
            "key": self.num_kv_heads,
            "value": self.num_kv_heads,
            "qkv": self.num_heads + 2 * self.num_kv_heads,
            "output": self.num_heads,
            "gate": self.num_heads,
        }
        key_rows = self.num_kv_heads * self.head_dim
        fused = (self.num_heads * self.head_dim, key_rows, key_rows)
        roles = {}
        for name, _ in self.named_parameters():
            module, _, kind = name.rpartition(".")
            if kind == "sink":
                roles[name] = ParameterRole("sink")
            elif module.endswith("_norm"):
                roles[name] = ParameterRole("norm")
            elif kind == "bias":
                roles[name] = ParameterRole("bias")
            else:
                roles[name] = ParameterRole(module, heads[module], fused if module == "qkv" else ())
        return roles
