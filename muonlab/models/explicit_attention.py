"""Attention with every logit in memory: the plain form, fast for short contexts on a CPU, and the measured one.

Shape legend: B batch, T positions, H query heads, K key-value heads, d head_dim.
"""

import torch
from torch import Tensor

from muonlab.models.max_logits import LogitRange, at_least_fp32, visible_bias

# A row of attention counts as one-hot when one weight is above this, which leaves a twentieth for all other keys.
ONE_HOT = 0.95


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_cap: float = 0.0,
    forced_max: float = 0.0,
    documents: Tensor | None = None,
    softmax_dtype: torch.dtype = torch.float32,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, LogitRange]:
    """softmax(q k' / sqrt(d)) v: output (B, H, T, d), weights (B, H, T, T), extremes; logits in fp32 at least.

    `soft_cap` c > 0 replaces each logit s by c tanh(s / c) (arXiv 2408.00118, section 2); the extremes are those
    before the cap. `forced_max` kappa > 0 scales each head's logits so that their largest magnitude over the batch is
    kappa, with no gradient through the factor (Wortsman et al., arXiv 2309.14322, Fig 7); the extremes are those
    after it. 0 means neither. `documents` (B, T): a position sees only its own document's.
    `softmax_dtype` below fp32 rounds the logits to it, behind the extremes, and takes the softmax in it.
    `sink` (H,): the logit of a further key without a value, which every row of the head sees and no extreme counts: the
    weights are exp(s_ij) / (exp(sink_h) + sum_j exp(s_ij)), a row's sum is below 1 (GPT-OSS, arXiv 2508.10925).
    """
    batch, heads, length, head_dim = q.shape
    group = heads // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q, k = at_least_fp32(q).flatten(0, 1), at_least_fp32(k).flatten(0, 1)
    bias = visible_bias(documents, 0, length, q)
    if documents is not None:
        bias = bias.expand(batch, heads, length, length).flatten(0, 1)
    with torch.autocast(q.device.type, enabled=False):
        # One product scales and masks too: at small sizes every further pass over the logits costs as much as it does.
        scores = torch.baddbmm(bias, q, k.transpose(-1, -2), alpha=head_dim**-0.5)
    with torch.no_grad():
        highest = scores.amax((-2, -1)).view(batch, heads).amax(0)
        lowest = scores.nan_to_num(torch.nan, torch.inf, torch.inf).amin((-2, -1)).view(batch, heads).amin(0)
        factor = forced_max / torch.maximum(highest, -lowest)
    if forced_max:
        scores = scores * factor.repeat(batch).view(-1, 1, 1)  # s_ij kappa / max |s|
        highest, lowest = highest * factor, lowest * factor
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap) + bias  # the cap maps -inf to -c
    if softmax_dtype.itemsize < torch.float32.itemsize:
        scores = scores.to(softmax_dtype)
    if sink is not None:
        column = sink.to(scores.dtype).repeat(batch).view(-1, 1, 1)
        scores = torch.cat((scores, column.expand(-1, length, 1)), -1)
    with torch.autocast(q.device.type, enabled=False):  # which would take every softmax in fp32
        weights = scores.softmax(-1)[..., :length].unflatten(0, (batch, heads))
    return weights.to(v.dtype) @ v, weights, LogitRange(highest, lowest)


def attention_entropy(weights: Tensor) -> Tensor:
    """Mean over batch and queries of H_i = -sum_j a_ij ln a_ij, in nats, per head: (B, H, T, T) -> (H,).

    0: the head always attends to one position; a uniform causal head of context T has mean ln(i) over i <= T.
    """
    # special.entr gives the same for a weight of 0, but takes three times as long on a CPU.
    logs = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
    return (weights * logs).sum(-1).mean((0, 2)).neg()


def one_hot_share(weights: Tensor) -> Tensor:
    """Share of query rows whose largest weight is above ONE_HOT, per head: (B, H, T, T) -> (H,).

    The first position, which sees a single key, is left out; 0 if there is no other.
    """
    largest = weights[:, :, 1:].amax(-1)
    return (largest > ONE_HOT).sum((0, 2)) / max(1, largest.shape[0] * largest.shape[2])
