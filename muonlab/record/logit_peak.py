"""Why the largest attention logit is as large as it is: two norms and a direction.

Shape legend: B batch, T positions, H query heads, K key-value heads, d head_dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Logits held at once: 256 MiB of fp32.
_ELEMENTS = 1 << 26


class LogitPeak(NamedTuple):
    """The largest visible logit of one attention layer, q_i . k_j / sqrt(d), and its parts, all 0-dim, in fp64.

    max_logit = query_norm * key_norm * cosine / sqrt(d), so ln max_logit = ln |q_i| + ln |k_j| + ln cos - ln sqrt(d)
    splits its growth exactly into norms and direction (Wortsman et al., arXiv 2309.14322, appendix E.1). `query_rms`
    and `key_rms` are the root mean square norms over all positions of the same head's queries and keys: a norm far
    above it is an outlier token's. `head` is the query head, from 0.
    """

    max_logit: Tensor
    query_norm: Tensor
    key_norm: Tensor
    cosine: Tensor
    query_rms: Tensor
    key_rms: Tensor
    head: Tensor


@torch.no_grad()
def logit_peak(q: Tensor, k: Tensor) -> LogitPeak:
    """The peak over batch, heads and causal pairs j <= i of q (B, H, T, d) and k (B, K, T, d), one text per sequence.

    Query head h meets key head h // (H / K). The logit is the scaled product alone, before any soft-cap, and signed:
    where every one is negative, the largest is too. A NaN among q or k gives NaN. The host waits for the device.
    """
    batch, heads, length, head_dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide).repeat_interleave(heads // k.shape[1], 1)
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    size = max(1, _ELEMENTS // (heads * length * length))
    values, places = [], []
    with torch.autocast(q.device.type, enabled=False):
        for first in range(0, batch, size):
            products = q[first : first + size] @ k[first : first + size].mT
            products = products.masked_fill(future, -torch.inf).flatten()
            place = products.argmax()
            values.append(products[place])
            places.append(place + first * heads * length**2)
    place = torch.stack(places)[torch.stack(values).argmax()]
    sequence, head, i, j = (
        int(index) for index in torch.unravel_index(place, (batch, heads, length, length))
    )
    query, key = q[sequence, head, i].double(), k[sequence, head, j].double()
    product, norms = query @ key, (query.norm(), key.norm())
    smallest = torch.finfo(torch.float64).tiny
    return LogitPeak(
        product / head_dim**0.5,
        *norms,
        product / (norms[0] * norms[1]).clamp_min(smallest),
        _rms_norm(q[:, head]),
        _rms_norm(k[:, head]),
        torch.tensor(float(head), dtype=torch.float64, device=q.device),
    )


def _rms_norm(vectors: Tensor) -> Tensor:
    return vectors.double().square().sum(-1).mean().sqrt()
