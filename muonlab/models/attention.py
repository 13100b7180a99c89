"""Causal self-attention that always can say its exact per-head max logit.

Shape legend: B batch, T positions, D model width, H query heads, K key-value heads, d head_dim.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows, ParameterRole
from muonlab.models.norm import RMSNorm

# Rows of logits held at once by the exact pass: 64 MiB of fp32 at most, whatever the context.
EXACT_PASS_ELEMENTS = 1 << 24
# Up to this context explicit attention is the faster of the two on a CPU, and its extremes cost nothing more
# (`make bench-step` measures both).
EXPLICIT_CONTEXT = 128


class LogitRange(NamedTuple):
    """Extremes over batch and causal pairs of the scaled logits s_ij = q_i . k_j / sqrt(d), each of shape (H,).

    `highest` is K2's signed max logit S_h (arXiv 2507.20534, section 2.1); the absolute one is
    max(highest, -lowest).
    """

    highest: Tensor
    lowest: Tensor


class AttentionOutput(NamedTuple):
    """`x` (B, T, D); `logits` None unless measured; `entropy` (H,) in nats, None unless asked for."""

    x: Tensor
    logits: LogitRange | None
    entropy: Tensor | None


def rotary_dim(head_dim: int, fraction: float) -> int:
    """Entries of a head that are rotated, fraction * head_dim; MuonlabError if that is odd or no whole number."""
    rotated = fraction * head_dim
    if not 0 <= fraction <= 1 or rotated % 2:
        raise MuonlabError(
            f"rotary_fraction={fraction:g} of head_dim={head_dim} rotates {rotated:g} entries;"
            f" it must be an even number from 0 to {head_dim}"
        )
    return int(rotated)


def rotary_tables(head_dim: int, context: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of RoPE (arXiv 2104.09864, eq. 34), each (context, head_dim), halves paired.

    The sign of the rotation is folded into the sine so that a rotation is x * cos + roll(x) * sin.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), 1).float(), torch.cat((-sin, sin), 1).float()


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: three passes, where autograd's own makes six."""

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


def at_least_fp32(x: Tensor) -> Tensor:
    """x, or x in fp32 where its dtype is shorter: logits and losses are never rounded to 8 or 11 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def causal_bias(rows: int, keys: int, like: Tensor) -> Tensor:
    """(rows, keys): 0 where the query may look, -inf where it may not; the last query is the last key's."""
    return torch.full((rows, keys), -torch.inf, dtype=like.dtype, device=like.device).triu_(1 + keys - rows)


@torch.no_grad()
def logit_range(q: Tensor, k: Tensor) -> LogitRange:
    """Exact extremes of the causal scaled logits of q (B, H, T, d) and k (B, K, T, d), in row chunks."""
    batch, heads, length, head_dim = q.shape
    q = q.unflatten(1, (k.shape[1], heads // k.shape[1])) * head_dim**-0.5  # (B, K, H/K, T, d)
    k = k.unsqueeze(2).transpose(-1, -2)
    rows = max(1, min(length, EXACT_PASS_ELEMENTS // (batch * heads * length)))
    highest, lowest = [], []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        scores = at_least_fp32(q[..., start:stop, :] @ k[..., :stop])
        bias = causal_bias(stop - start, stop, scores)
        # where() and aminmax() would say it in one line, but on a CPU take several times as long.
        highest.append((scores + bias).flatten(-2).amax(-1).amax(0))
        lowest.append((scores - bias).flatten(-2).amin(-1).amin(0))
    return LogitRange(torch.stack(highest).amax(0).flatten(), torch.stack(lowest).amin(0).flatten())


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, soft_cap: float = 0.0, forced_max: float = 0.0
) -> tuple[Tensor, Tensor, LogitRange]:
    """softmax(q k' / sqrt(d)) v with every logit in memory: output (B, H, T, d), weights (B, H, T, T), extremes.

    `soft_cap` c > 0 replaces each logit s by c tanh(s / c) (arXiv 2408.00118, section 2); the extremes are those
    before the cap. `forced_max` kappa > 0 scales each head's logits so that their largest magnitude over the batch is
    kappa, with no gradient through the factor (Wortsman et al., arXiv 2309.14322, Fig 7); the extremes are those
    after it. 0 means neither.
    """
    batch, heads, length, head_dim = q.shape
    group = heads // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    # One product scales and masks too: at small sizes every further pass over the logits costs as much as it does.
    bias = causal_bias(length, length, q)
    scores = at_least_fp32(torch.baddbmm(bias, q, k.transpose(-1, -2), alpha=head_dim**-0.5))
    with torch.no_grad():
        highest = scores.amax((-2, -1)).view(batch, heads).amax(0)
        lowest = scores.nan_to_num(torch.nan, torch.inf, torch.inf).amin((-2, -1)).view(batch, heads).amin(0)
    if forced_max:
        factor = forced_max / torch.maximum(highest, -lowest)
        scores = scores * factor.repeat(batch).view(-1, 1, 1)  # s_ij kappa / max |s|
        highest, lowest = highest * factor, lowest * factor
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap) + bias  # the cap maps -inf to -c
    weights = scores.softmax(-1).view(batch, heads, length, length)
    return weights.to(v.dtype) @ v, weights, LogitRange(highest, lowest)


def attention_entropy(weights: Tensor) -> Tensor:
    """Mean over batch and queries of H_i = -sum_j a_ij ln a_ij, in nats, per head: (B, H, T, T) -> (H,).

    0 is a head that always looks at one place; a uniform causal head of context T has mean ln(i) over i <= T.
    """
    return torch.special.entr(weights).sum(-1).mean((0, 2))


class Attention(nn.Module):
    """Multi-head, grouped-query (num_kv_heads < num_heads) or multi-query (num_kv_heads = 1) attention.

    Query, key and value are separate matrices, so that Muon orthogonalises each by itself. `soft_cap` 0 means
    none. `rotary_fraction` is the share of each head's entries that rotary embedding turns, the first ones (1: all,
    0: no positions at all). `forced_max` kappa > 0 forces every head's largest |logit| over the batch to kappa, later
    tokens included: an experiment that asks what large logits do by themselves, not a model to use.
    Raises MuonlabError where the heads do not divide the width or the rotated part is odd.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        soft_cap: float = 0.0,
        rotary_fraction: float = 1.0,
        forced_max: float = 0.0,
    ):
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads < 1 or d_model % num_heads:
            raise MuonlabError(f"num_heads={num_heads} does not divide the width d_model={d_model}")
        if num_heads % num_kv_heads:
            raise MuonlabError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        if forced_max < 0:
            raise MuonlabError(f"forced_max_logit must be 0 (none) or positive, not {forced_max}")
        if soft_cap < 0:
            raise MuonlabError(f"attention_soft_cap must be 0 (none) or positive, not {soft_cap}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, d_model // num_heads
        self.soft_cap, self.forced_max = soft_cap, forced_max
        self.rotary_dim = rotary_dim(self.head_dim, rotary_fraction)
        self.query = nn.Linear(d_model, num_heads * self.head_dim, bias=bias)
        self.key = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(num_heads * self.head_dim, d_model, bias=bias)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, measure_entropy: bool = False) -> AttentionOutput:
        """x (B, T, D) with rotary tables (T, 1, d). Logit extremes are measured in training mode only."""
        q, k, v = self.project(x, cos, sin)
        entropy = logits = None
        short = x.device.type == "cpu" and x.shape[1] <= EXPLICIT_CONTEXT
        if measure_entropy or self.soft_cap or self.forced_max or short:
            out, weights, extremes = explicit_attention(q, k, v, self.soft_cap, self.forced_max)
            logits = extremes if self.training else None
            entropy = attention_entropy(weights) if measure_entropy else None
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=self.num_kv_heads < self.num_heads
            )
            logits = logit_range(q.detach(), k.detach()) if self.training else None
        return AttentionOutput(self.output(out.transpose(1, 2).flatten(2)), logits, entropy)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), keys and values (B, K, T, d), normalised and rotated.

        One product for the three matrices and one rotation for queries and keys: at small widths a step is
        overhead more than arithmetic.
        """
        projections = (self.query, self.key, self.value)
        bias = None if self.query.bias is None else torch.cat([p.bias for p in projections])
        qkv = F.linear(x, torch.cat([p.weight for p in projections]), bias).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.query_norm is not None:
            q, k = qk.split((self.num_heads, self.num_kv_heads), dim=2)
            qk = torch.cat((self.query_norm(q), self.key_norm(k)), dim=2)
        if self.rotary_dim == self.head_dim:
            qk = rotate(qk, cos, sin)
        elif self.rotary_dim:
            turned, still = qk.split((self.rotary_dim, self.head_dim - self.rotary_dim), dim=-1)
            qk = torch.cat((rotate(turned, cos, sin), still), -1)
        q, k = qk.split((self.num_heads, self.num_kv_heads), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def layout(self, name: str) -> AttentionLayout:
        """Which rows make each head's query and key; inert under QK-norm, which undoes any scaling of them."""

        def rows(linear: nn.Linear) -> tuple[HeadRows, ...]:
            parameters = (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)
            return tuple(HeadRows(p, rows=self.head_dim) for p in parameters)

        inert = (
            "QK-norm normalises queries and keys after these weights"
            if self.query_norm is not None
            else "forced_max_logit sets the logits whatever these weights are"
            if self.forced_max
            else ""
        )
        return AttentionLayout(
            name, self.num_heads, self.num_kv_heads, rows(self.query), rows(self.key), inert=inert
        )

    def roles(self) -> dict[str, ParameterRole]:
        """The role of each parameter by its name within this module."""
        heads = {
            "query": self.num_heads,
            "key": self.num_kv_heads,
            "value": self.num_kv_heads,
            "output": self.num_heads,
        }
        roles = {}
        for name, _ in self.named_parameters():
            module, kind = name.rsplit(".", 1)
            if module.endswith("_norm"):
                roles[name] = ParameterRole("norm")
            elif kind == "bias":
                roles[name] = ParameterRole("bias")
            else:
                roles[name] = ParameterRole(module, heads[module])
        return roles
