"""Attention by the fused kernel of the device, and the logit statistics that the kernel reports.

    CPU     PyTorch's flash attention, called in the form that returns its log-sum-exp
    CUDA    FlexAttention, which reports its maxima; else scaled_dot_product_attention, which does not

Shape legend: B batch, T positions, H query heads, K key-value heads, d head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from muonlab.models.flex import flex_attend, flex_supports
from muonlab.models.max_logits import LayerLogits, visible_bias


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, LayerLogits]:
    """softmax(q k' / sqrt(d)) v over the visible pairs: output (B, H, T, d_v), and its logits as far as known.

    q (B, H, T, d), k (B, K, T, d) and v (B, K, T, d_v) of one dtype, in which they are multiplied.
    `documents` (B, T): a position sees only its own document's.
    """
    seen = LayerLogits(None, q.detach(), k.detach(), documents)
    if flex_supports(q, v):
        out, highest = flex_attend(q, k, v, documents)
        return out, seen._replace(highest=highest)
    bias = None if documents is None else visible_bias(documents, 0, q.shape[2], q)
    if q.device.type != "cpu":
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=q.shape[1] > k.shape[1]
        )
        return out, seen
    # One head_dim for all three; zeros add nothing to a product and are cut off the output.
    width, scale = max(q.shape[-1], v.shape[-1]), q.shape[-1] ** -0.5
    out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v)),
        is_causal=bias is None,
        attn_mask=bias,
        scale=scale,
    )
    return out[..., : v.shape[-1]], seen._replace(log_sum_exp=log_sum_exp.detach().amax((0, 2)))
