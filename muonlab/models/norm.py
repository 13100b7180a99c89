"""RMSNorm, with a backward of few passes where torch has no fused one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """y = n w with n = x r, r = 1 / sqrt(mean(x^2) + eps), over the last dimension (arXiv 1910.07467, eq. 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return n * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        n, r, weight = ctx.saved_tensors
        gn = grad * n
        mean = (gn @ weight).unsqueeze(-1).div_(n.shape[-1])
        # dL/dx = r (g w - n mean(g w n)),  dL/dw = sum(g n)
        return torch.addcmul(grad * weight, n, mean, value=-1).mul_(r), gn.flatten(0, -2).sum(0), None


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last dimension with gains; same parameters, state dict and values.

    On the CPU torch has no fused kernel, and its backward is a dozen passes over x; this one makes half as many.
    """

    def __init__(self, size: int):
        super().__init__(size, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x, in the dtype of the gains (under autocast fp32, as torch's own norms)."""
        x = x.to(self.weight.dtype)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)
