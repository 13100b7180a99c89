"""Products of stacks of matrices (batch, rows, cols) whose result is symmetric.

XᵀX and products of commuting symmetric matrices need only half of their entries. With `strip` > 0 the
result is computed in horizontal strips from the diagonal to the right edge, and mirrored: n/strip strips
need (1 + strip/n)/2 of the multiplications. With `strip` 0 the whole product is one batched call.
"""

import torch
from torch import Tensor


def gram_matrix(X: Tensor, out: Tensor, strip: int) -> Tensor:
    """out = XᵀX for X (batch, m, n)."""
    return commuting_product(X.mT, X, out, strip)


def commuting_product(A: Tensor, B: Tensor, out: Tensor, strip: int) -> Tensor:
    """out = A B where A B is known to be symmetric; out must not overlap A or B."""
    n = out.shape[-1]
    if not 0 < strip < n:
        return torch.bmm(A, B, out=out)
    for a, b, c in zip(A, B, out, strict=True):
        for top in range(0, n, strip):
            bottom = min(top + strip, n)
            torch.mm(a[top:bottom], b[:, top:], out=c[top:bottom, top:])
            c[bottom:, top:bottom].copy_(c[top:bottom, bottom:].mT)
    return out


def quadratic(A: Tensor, row: tuple[float, float, float], out: Tensor, strip: int) -> Tensor:
    """out = a I + b A + c A² for symmetric A (batch, n, n)."""
    a, b, c = row
    if c == 0:
        torch.mul(A, b, out=out)
    else:
        commuting_product(A, A, out, strip).mul_(c).add_(A, alpha=b)
    out.diagonal(dim1=-2, dim2=-1).add_(a)
    return out
