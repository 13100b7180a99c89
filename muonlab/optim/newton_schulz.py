"""Orthogonalisation of matrices by Newton-Schulz iteration."""

from collections.abc import Sequence

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.schedules import Schedule, resolve_schedule


def newton_schulz(
    G: Tensor,
    schedule: "str | Schedule | Sequence[float] | Sequence[Sequence[float]]" = "jordan",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """U f(S) Vᵀ of every matrix G = U S Vᵀ in a stack (..., rows, cols)."""
    if G.ndim < 2 or G.is_complex() or not G.is_floating_point() or G.is_sparse:
        raise MuonlabError(
            "newton_schulz takes a dense real floating-point tensor (..., rows, cols), "
            f"not {G.dtype} of shape {tuple(G.shape)}"
        )
    chosen = resolve_schedule(schedule, steps)
    if dtype is None:
        dtype = G.dtype if G.dtype is torch.float64 else torch.bfloat16 if G.is_cuda else torch.float32
    wide = G if G.shape[-2] <= G.shape[-1] else G.mT
    X = normalise(wide, chosen.margin)
    if chosen.exact:
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        X = (U * (S > S.amax(-1, keepdim=True) * S.shape[-1] * torch.finfo(S.dtype).eps).unsqueeze(-2)) @ Vh
    else:
        X = X.to(dtype)
        for a, b, c in chosen.rows:
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
    X = X.to(G.dtype)
    return X if wide is G else X.mT


def normalise(X: Tensor, margin: float) -> Tensor:
    """X over margin times its Frobenius norm, in fp32 (fp64 for fp64); a zero matrix stays zero."""
    X = X if X.dtype is torch.float64 else X.float()
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return X / torch.where(norm > 0, norm * margin, 1.0)


def orthogonalise(
    matrices: Sequence[Tensor],
    schedule: "str | Schedule | Sequence[float] | Sequence[Sequence[float]]" = "jordan",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`newton_schulz` of every matrix of a list, same order and shapes; the inputs are not written to."""
    return [newton_schulz(G, schedule, steps, dtype) for G in matrices]
