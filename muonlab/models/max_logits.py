"""How large the attention logits of a training forward were: bounds at no cost, exact extremes on request.

Shape legend: B batch, T positions, H query heads, K key-value heads, d head_dim.

A logit is s_ij = q_i . k_j / sqrt(d), over the visible pairs: j <= i, within one document. Of a row with n visible
keys, max_j s_ij <= logsumexp_j s_ij <= max_j s_ij + ln n; a fused kernel has the middle term for its backward anyway.
So heads that stay below tau are recognised without computing a logit; the exact pass is for the others and for the
trace.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muonlab.models.flex import flex_highest

# Query rows of one product of the exact pass. On a CPU the logits of 64 rows of a head stay in the cache, and at
# context 1024 the pass takes a fifth of the time that it takes with them in memory.
CPU_ROWS = 64
# On a GPU, logits held at once: 256 MiB of fp32, few launches.
DEVICE_ELEMENTS = 1 << 26
# Kernels may round a log-sum-exp by more than its last bit (PyTorch's in bf16 by 6e-5); a bound must remain a bound.
ROUNDING = 2.0**-12


class LogitRange(NamedTuple):
    """Extremes over batch and visible pairs of the scaled logits of each head, (H,) or (layers, H).

    `highest` is K2's signed max logit S_h (arXiv 2507.20534, section 2.1); the absolute one is
    max(highest, -lowest).
    """

    highest: Tensor
    lowest: Tensor

    @property
    def absolute(self) -> Tensor:
        """The largest magnitude of a logit."""
        return torch.maximum(self.highest, -self.lowest)


class LayerLogits(NamedTuple):
    """The remains of one layer's training forward, from which bounds and extremes are computed.

    extremes: exact, where every logit was in memory; None otherwise.
    queries, keys: (B, H, T, d) and (B, K, T, d) as the kernel multiplied them; None where `extremes` are known.
    documents: (B, T), or None for one per sequence.
    log_sum_exp: the largest of a row, (H,), where the kernel reports it; else None.
    highest: the highest logit itself, (H,), where the kernel reports it; else None.
    """

    extremes: LogitRange | None
    queries: Tensor | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None
    log_sum_exp: Tensor | None = None
    highest: Tensor | None = None

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Queries and keys, which are kept where the extremes are not."""
        assert self.queries is not None
        assert self.keys is not None
        return self.queries, self.keys


def at_least_fp32(x: Tensor) -> Tensor:
    """x, in fp32 if its dtype is shorter: logits and losses are never rounded to 8 or 11 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def causal_bias(rows: int, keys: int, like: Tensor) -> Tensor:
    """(rows, keys): 0 where the query may look, -inf where it may not; the last query is the last key's."""
    return torch.full((rows, keys), -torch.inf, dtype=like.dtype, device=like.device).triu_(1 + keys - rows)


def visible_bias(documents: Tensor | None, start: int, stop: int, like: Tensor) -> Tensor:
    """Bias of query rows start..stop on the keys before `stop`: (rows, stop), or (B, 1, rows, stop) with documents."""
    bias = causal_bias(stop - start, stop, like)
    if documents is None:
        return bias
    same = documents[:, None, start:stop, None] == documents[:, None, None, :stop]
    return torch.where(same, bias, -torch.inf)


@torch.no_grad()
def logit_range(q: Tensor, k: Tensor, documents: Tensor | None = None) -> LogitRange:
    """Exact extremes of the visible scaled logits of q (B, H, T, d) and k (B, K, T, d), each (H,), in fp32 at least.

    Computed in chunks, so that only a few rows of logits are in memory at a time.
    """
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    with torch.autocast(q.device.type, enabled=False):
        # The query heads that share a key are further rows of one product with it.
        q = at_least_fp32(q).reshape(batch * kv_heads, group, length, head_dim)
        k = at_least_fp32(k).reshape(batch * kv_heads, length, head_dim).transpose(-1, -2)
        rows = CPU_ROWS if q.device.type == "cpu" else max(1, DEVICE_ELEMENTS // (batch * heads * length))
        highest, lowest = [], []
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            chunk = q[:, :, start:stop].reshape(batch * kv_heads, -1, head_dim)
            # Keys before the chunk are visible to all of it, and need no mask, unless documents say otherwise.
            first = 0 if documents is not None else start
            if first:
                scores = (chunk @ k[..., :first]).view(batch, heads, -1)
                highest.append(scores.amax(-1).amax(0))
                lowest.append(scores.amin(-1).amin(0))
            scores = (chunk @ k[..., first:stop]).view(batch, heads, stop - start, -1)
            bias = visible_bias(documents, start, stop, scores)[..., first:]
            # where() and aminmax() would be one line, but take several times as long on a CPU.
            highest.append((scores + bias).flatten(-2).amax(-1).amax(0))
            lowest.append((scores - bias).flatten(-2).amin(-1).amin(0))
    scale = head_dim**-0.5
    return LogitRange(torch.stack(highest).amax(0) * scale, torch.stack(lowest).amin(0) * scale)


@torch.no_grad()
def logit_bounds(layer: LayerLogits) -> LogitRange:
    """Bounds of a layer's logits, each (H,): none is above `highest` or below `lowest`; exact where known.

    |s_ij| <= max_i |q_i| max_j |k_j| / sqrt(d) (Cauchy-Schwarz) at both ends; at the upper one also the log-sum-exp,
    which is far tighter. Both are widened by ROUNDING (1 + |bound|).
    """
    if layer.extremes is not None:
        return layer.extremes
    vectors = layer.vectors()
    # Summed and kept in fp32 at least: a norm rounded to bf16 may be 0.4 % too small, and would not be a bound.
    wide = torch.promote_types(vectors[0].dtype, torch.float32)
    q, k = (torch.linalg.vector_norm(x, dim=-1, dtype=wide).amax((0, 2)) for x in vectors)
    norms = q * k.repeat_interleave(len(q) // len(k)) * vectors[0].shape[-1] ** -0.5
    highest = norms if layer.log_sum_exp is None else torch.minimum(layer.log_sum_exp, norms)
    highest, lowest = highest + ROUNDING * (1 + highest.abs()), -norms - ROUNDING * (1 + norms)
    return LogitRange(highest if layer.highest is None else layer.highest, lowest)


def logit_extremes(layers: Sequence[LayerLogits]) -> LogitRange:
    """Exact extremes of every layer, each (layers, H)."""
    return _stack([_exact(layer) for layer in layers])


@torch.no_grad()
def bounded_logits(
    layers: Sequence[LayerLogits], limit: float = torch.inf, absolute: bool = False
) -> tuple[LogitRange, Tensor]:
    """Bounds of every layer, and the exact extremes of the heads whose bound does not stay below `limit`.

    Returns them, each (layers, H), and which heads' are exact at both ends, (layers, H) bool. A rule that acts only on
    logits above the limit therefore acts as it would on exact extremes.

    limit: inf: bounds alone. A bound of NaN counts as above the limit.
    absolute: the bound of the magnitude, not of the highest logit, must stay below the limit.

    With a limit the host waits once for the device, because the bounds decide which heads are computed; not where the
    kernels report the highest logit and `absolute` is false.
    """
    ranges = _stack([logit_bounds(layer) for layer in layers])
    # Filled on the device: a list would be copied to it, and the host wait for the copy.
    exact = torch.zeros_like(ranges.highest, dtype=torch.bool)
    for row, layer in zip(exact, layers, strict=True):
        row.fill_(layer.extremes is not None)
    enough = all(  # what the kernels report is the very extreme that the limit is about
        layer.extremes is not None or (layer.highest is not None and not absolute) for layer in layers
    )
    if limit == torch.inf or enough:
        return ranges, exact
    bound = ranges.absolute if absolute else ranges.highest
    suspects = (~(bound < limit) & ~exact).cpu()
    for i in suspects.any(1).nonzero().flatten().tolist():
        members, part = _with_groups(layers[i], suspects[i])
        for ends, value in zip(ranges, _exact(part), strict=True):
            ends[i, members] = value
        exact[i, members] = True
    return ranges, exact


def _with_groups(layer: LayerLogits, suspects: Tensor) -> tuple[Tensor, LayerLogits]:
    """The suspect heads (H,) and all that share their keys, as indices and as a layer: the full pass's products."""
    queries, keys = layer.vectors()
    members = torch.arange(queries.shape[1], device=queries.device).view(keys.shape[1], -1)
    if layer.highest is None:
        groups = suspects.view(members.shape).any(1).nonzero().flatten().to(queries.device)
        members = members[groups]
        layer = layer._replace(queries=queries[:, members.flatten()], keys=keys[:, groups])
    return members.flatten(), layer


def _exact(layer: LayerLogits) -> LogitRange:
    if layer.extremes is not None:
        return layer.extremes
    queries, keys = layer.vectors()
    if layer.highest is None:
        return logit_range(queries, keys, layer.documents)
    # The kernel that reported the highest logit of q gives the lowest as minus the highest of -q.
    return LogitRange(layer.highest, -flex_highest(-queries, keys, layer.documents))


def _stack(ranges: Sequence[LogitRange]) -> LogitRange:
    return LogitRange(*(torch.stack(ends) for ends in zip(*ranges, strict=True)))
