"""Spectra of weights and of updates: entropy, stable rank, largest singular value, and what an update adds to it.

Shape legend: ... any stack, m rows, n columns, r = min(m, n). Everything is computed in fp64 and without gradients. All
measures but the overlap are functions of sigma^2, so they come from the eigenvalues of the smaller Gram matrix, which
costs half of a singular value decomposition; singular values below 1e-8 of the largest are noise. Every
measure of a matrix with an entry that is not finite is NaN, and of a matrix of zeros it is 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny


class Spectrum(NamedTuple):
    """`values` (..., r), singular values in descending order; `left` (..., m) and `right` (..., n), the top pair."""

    values: Tensor
    left: Tensor
    right: Tensor


@torch.no_grad()
def singular_values(W: Tensor) -> Tensor:
    """Singular values of W (..., m, n) in descending order, (..., r)."""
    gram, finite = _gram(W)
    return _roots(torch.linalg.eigvalsh(gram), finite)


@torch.no_grad()
def spectrum(W: Tensor) -> Spectrum:
    """Singular values of W (..., m, n) and its top singular pair u_1, v_1 (their common sign is arbitrary)."""
    W = W.double()
    gram, finite = _gram(W)
    squares, vectors = torch.linalg.eigh(gram)
    top = vectors[..., -1]  # v_1 where the Gram matrix is W'W, u_1 where it is WW'
    tall = W.shape[-2] >= W.shape[-1]
    image = ((W if tall else W.mT) @ top.unsqueeze(-1)).squeeze(-1)
    other = image / image.norm(dim=-1, keepdim=True).clamp_min(_TINY)  # u_1 = W v_1 / sigma_1
    left, right = (other, top) if tall else (top, other)
    return Spectrum(_roots(squares, finite), left, right)


def svd_entropy(values: Tensor) -> Tensor:
    """Entropy of the squared singular values (..., r) over its maximum, (...): 1 all equal, 0 rank one.

    Moonlight's measure (arXiv 2502.16982, Fig 4). 0 also where there is only one singular value.
    """
    squares = values.square()
    p = squares / squares.sum(-1, keepdim=True).clamp_min(_TINY)  # p_i = sigma_i^2 / sum_j sigma_j^2
    most = math.log(values.shape[-1]) or 1.0
    return torch.special.entr(p).sum(-1) / most  # -(1 / ln r) sum_i p_i ln p_i


def stable_rank(values: Tensor) -> Tensor:
    """||W||_F^2 / ||W||_2^2 of singular values (..., r), (...): from 1 (rank one) to r (all equal)."""
    squares = values.square()
    return squares.sum(-1) / squares[..., 0].clamp_min(_TINY)


@torch.no_grad()
def overlap(update: Tensor, weight: Spectrum, norm: Tensor) -> Tensor:
    """u_1' dW v_1 / ||dW||_2, from -1 to 1: the share of an update's largest gain that goes into the weight's.

    update dW (..., m, n); `weight` the spectrum of W before the update; `norm` (...), ||dW||_2. To first order
    sigma_1(W + dW) - sigma_1(W) = u_1' dW v_1, so this times ||dW||_2 is how fast the largest singular value grows
    (positive) or shrinks (negative): the additive growth that Kimi K2 explains exploding logits by (arXiv 2507.20534,
    appendix E). It needs no singular vectors of dW, which Muon leaves undetermined by making its singular values
    equal. An update that is independent of W has mean 0 and root mean square 1 / (sqrt(m) + sqrt(n)) if its entries
    are independent and normal, 1 / sqrt(max(m, n)) if its rows or columns are orthonormal.
    """
    gain = torch.einsum("...m,...mn,...n->...", weight.left, update.double(), weight.right)
    return gain / norm.clamp_min(_TINY)


def group_spectra(weights: Sequence[Tensor], updates: Sequence[Tensor]) -> dict[str, Tensor]:
    """The recorded measures of a group of matrices (m, n) and stacks of them (E, m, n), as 0-dim tensors.

    `updates` are the changes of `weights` in one step. `svd_entropy`, `update_svd_entropy`, `stable_rank` and `overlap`
    are means over all matrices, each counted once whatever its size; `sigma_max` is the largest of any of them;
    `frobenius` is the norm of them all together.
    """
    collected: dict[str, list[Tensor]] = {}
    for weight, update in zip(_stacks(weights), _stacks(updates), strict=True):
        of_weight, changes = spectrum(weight), singular_values(update)
        for name, value in {
            "svd_entropy": svd_entropy(of_weight.values),
            "update_svd_entropy": svd_entropy(changes),
            "stable_rank": stable_rank(of_weight.values),
            "overlap": overlap(update, of_weight, changes[:, 0]),
            "sigma_max": of_weight.values[:, 0],
            "frobenius": of_weight.values.norm(dim=-1),
        }.items():
            collected.setdefault(name, []).append(value)
    joined = {name: torch.cat(parts) for name, parts in collected.items()}
    reduced = {"sigma_max": torch.amax, "frobenius": torch.linalg.vector_norm}
    return {name: reduced.get(name, torch.mean)(values) for name, values in joined.items()}


def _stacks(matrices: Sequence[Tensor]) -> list[Tensor]:
    """All matrices as stacks (k, m, n) of one shape with m >= n: transposed, they have the same measures."""
    stacks: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        tall = matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT
        stacks.setdefault(tall.shape[-2:], []).append(tall.reshape(-1, *tall.shape[-2:]))
    return [torch.cat(stack) for stack in stacks.values()]


def _gram(W: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller of W'W and WW' (..., r, r), zeros where it is not finite, and where it is, (...)."""
    W = W.double()
    gram = W.mT @ W if W.shape[-2] >= W.shape[-1] else W @ W.mT
    finite = gram.isfinite().all(-1).all(-1)
    return gram.where(finite[..., None, None], 0.0), finite  # LAPACK refuses NaN with an exception


def _roots(squares: Tensor, finite: Tensor) -> Tensor:
    """Ascending eigenvalues of Gram matrices as descending singular values; rounding may make them negative."""
    return squares.clamp_min(0).sqrt().flip(-1).where(finite[..., None], torch.nan)
