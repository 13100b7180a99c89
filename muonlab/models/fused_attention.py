"""Attention by the fused kernel of the device, and the logit statistics that the kernel reports.

    CPU     PyTorch's flash attention, called in the form that returns its log-sum-exp
    CUDA    FlexAttention, which reports its maxima; else scaled_dot_product_attention, which does not

Shape legend: B batch, T positions, H query heads, K key-value heads, d head_dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muonlab.models.flex import flex_attend, flex_supports
from muonlab.models.max_logits import LayerLogits, visible_bias


class _FlashWithSink(torch.autograd.Function):
    """PyTorch's flash attention on a CPU whose rows also see a key without a value, of logit sink_h.

    With l the log-sum-exp of a row's own logits and l' = ln(exp(l) + exp(sink)), its weights are p' = exp(s - l') and
    its output is the kernel's times exp(l - l'). The kernel's backward computes ds = p (dp - sum_j p_j dp_j) from the
    output and the log-sum-exp that it is given; given this output and l', it gives the gradients of queries, keys and
    values. The sink has no value, so that its dp is 0 and its gradient -p'_sink sum_j p'_j dp_j.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=bias is None, attn_mask=bias, scale=scale
        )
        logit = sink.to(own.dtype).view(-1, 1)
        log_sum_exp = torch.logaddexp(own, logit)
        out = out * (own - log_sum_exp).exp().unsqueeze(-1).to(out.dtype)
        ctx.save_for_backward(q, k, v, out, log_sum_exp, logit)
        ctx.bias, ctx.scale, ctx.sink_dtype = bias, scale, sink.dtype
        ctx.mark_non_differentiable(own)
        return out, own

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum_exp, logit = ctx.saved_tensors
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum_exp, 0.0, ctx.bias is None, attn_mask=ctx.bias, scale=ctx.scale
        )
        row = (grad.to(log_sum_exp.dtype) * out).sum(-1)  # sum_j p' dp
        sink = -((logit - log_sum_exp).exp() * row).sum((0, 2))
        return *gradients, sink.to(ctx.sink_dtype), None, None


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None, sink: Tensor | None = None
) -> tuple[Tensor, LayerLogits]:
    """softmax(q k' / sqrt(d)) v over the visible pairs: output (B, H, T, d_v), and its logits as far as known.

    q (B, H, T, d), k (B, K, T, d) and v (B, K, T, d_v) of one dtype, in which they are multiplied.
    `documents` (B, T): a position sees only its own document's. `sink` (H,): as in `explicit_attention`; not for
    scaled_dot_product_attention, which does not say how much weight a row had.
    """
    # Every LayerLogits is made whole: torch 2.11 cannot compile a model that keeps what _replace made.
    queries, keys = q.detach(), k.detach()
    if flex_supports(q, v):
        out, highest = flex_attend(q, k, v, documents, sink)
        return out, LayerLogits(None, queries, keys, documents, highest=highest)
    bias = None if documents is None else visible_bias(documents, 0, q.shape[2], q)
    if q.device.type != "cpu":
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=q.shape[1] > k.shape[1]
        )
        return out, LayerLogits(None, queries, keys, documents)
    # One head_dim for all three; zeros add nothing to a product and are cut off the output.
    width, scale = max(q.shape[-1], v.shape[-1]), q.shape[-1] ** -0.5
    q, k, v_wide = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    if sink is None:
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v_wide, is_causal=bias is None, attn_mask=bias, scale=scale
        )
    else:
        out, log_sum_exp = _FlashWithSink.apply(q, k, v_wide, sink, bias, scale)
    largest = log_sum_exp.detach().amax((0, 2))
    return out[..., : v.shape[-1]], LayerLogits(None, queries, keys, documents, log_sum_exp=largest)
