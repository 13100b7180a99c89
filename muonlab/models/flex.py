"""FlexAttention (arXiv 2412.05496) on CUDA: causal and document masks, and the maxima that its kernel has anyway."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Below these its Triton kernels have no products (head_dim), or no type.
LEAST_HEAD_DIM = 16
# How many shapes have a kernel of their own in one process; beyond them, as in torch, all run unfused.
SHAPES = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def flex_supports(q: Tensor, v: Tensor) -> bool:
    """Whether the kernel runs, forward and backward, on these queries and values (B, heads, T, d)."""
    return q.device.type == "cuda" and q.dtype in DTYPES and min(q.shape[-1], v.shape[-1]) >= LEAST_HEAD_DIM


def flex_attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, d) and the highest visible logit of every head (H,), in fp32, which has no gradient.

    The maxima are of the scores after scaling, in natural units (the kernel's own are log2's; torch converts them).
    With the log-sum-exp L of a row, a sink (H,) leaves its keys exp(L) / (exp(L) + exp(sink)) of their weight.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = _kernel()(
        q,
        k,
        v,
        block_mask=_block_mask(q.shape[2], q.device, documents),
        enable_gqa=q.shape[1] > k.shape[1],
        return_aux=AuxRequest(max_scores=True, lse=sink is not None),
    )
    if sink is not None:
        out = out * torch.sigmoid(aux.lse - sink.to(aux.lse.dtype).view(-1, 1)).unsqueeze(-1).to(out.dtype)
    return out, aux.max_scores.detach().amax((0, 2))


@torch.no_grad()
def flex_highest(q: Tensor, k: Tensor, documents: Tensor | None) -> Tensor:
    """The highest visible logit of every head, (H,): a forward whose output is thrown away."""
    return flex_attend(q, k, k, documents)[1]


def _kernel() -> Callable[..., Any]:
    """flex_attention as it is within a compiled model, else a compiled copy, so that it never runs unfused."""
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention
    return _compiled()


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    import torch._dynamo.config
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def fused(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):  # torch's own limit is 8 shapes
            return compiled(*args, **kwargs)

    return fused


def _block_mask(length: int, device: torch.device, documents: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if documents is not None:

        def within_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (documents[b, i] == documents[b, j])

        return create_block_mask(within_document, documents.shape[0], None, length, length, device=device)
    if torch.compiler.is_compiling():
        return create_block_mask(_causal, None, None, length, length, device=device)
    return _causal_block_mask(length, device)


@lru_cache(maxsize=8)
def _causal_block_mask(length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(_causal, None, None, length, length, device=device)


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j
