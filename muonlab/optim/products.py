"""Products of stacks (batch, rows, cols) that come out symmetric, which need only half of their entries.

X Xᵀ and products of commuting symmetric matrices are computed in horizontal strips from the diagonal to the
right edge and mirrored: n / strip strips need (1 + strip / n) / 2 of the multiplications. With `strip` 0,
or at least n, the product is computed whole, in one batched call.
"""

import torch
from torch import Tensor


def gram_matrix(X: Tensor, out: Tensor, strip: int) -> Tensor:
    """out = X Xᵀ for X (batch, n, m); out (batch, n, n) must not overlap X."""
    n = X.shape[-2]
    if not 0 < strip < n:
        return torch.bmm(X, X.mT, out=out)
    for x, c in zip(X, out, strict=True):
        for top, bottom in _strips(n, strip):
            torch.mm(x[top:bottom], x[top:].mT, out=c[top:bottom, top:])
            _mirror(c, top, bottom)
    return out


def symmetric_product(
    C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float, out: Tensor, strip: int
) -> Tensor:
    """out = beta C + alpha A B, all symmetric (batch, n, n), A B = B A; out must not overlap the others."""
    n = out.shape[-1]
    if not 0 < strip < n:
        return torch.baddbmm(C, A, B, beta=beta, alpha=alpha, out=out)
    for added, a, b, c in zip(C, A, B, out, strict=True):
        for top, bottom in _strips(n, strip):
            part = (slice(top, bottom), slice(top, n))
            torch.addmm(added[part], a[top:bottom], b[:, top:], beta=beta, alpha=alpha, out=c[part])
            _mirror(c, top, bottom)
    return out


def _strips(n: int, strip: int) -> list[tuple[int, int]]:
    return [(top, min(top + strip, n)) for top in range(0, n, strip)]


def _mirror(c: Tensor, top: int, bottom: int) -> None:
    """Copy the strip right of the diagonal block to the columns below it."""
    c[bottom:, top:bottom].copy_(c[top:bottom, bottom:].mT)
