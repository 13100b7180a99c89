"""Shampoo and KL-Shampoo: a matrix' gradient between inverse roots of the covariances of its rows and columns.

Shampoo (Gupta et al., arXiv 1802.09568, algorithm 1; momentum and the average in place of the sum as in
facebookresearch/optimizers), with M the average of gradients G:

    L <- b2 L + (1 - b2) G Gᵀ;  R <- b2 R + (1 - b2) Gᵀ G          b2 = 1: sums, L <- L + G Gᵀ
    D = (L / (1 - b2^t) + eps I)^(-1/4)  M / (1 - b1^t)  (R / (1 - b2^t) + eps I)^(-1/4)

KL-Shampoo (Lin et al., arXiv 2509.03378, by the authors' code, yorkerlin/KL-Methods) whitens the gradient by the other
covariance before it enters one, which is what minimises a Kullback-Leibler divergence. With QL, QR the eigenvectors of
L, R and l, r vectors of their eigenvalues, which are averages of their own:

    E = 1 / sqrt(l rᵀ);  D = QL ((QLᵀ M QR) E / (1 + eps E)) QRᵀ
    L <- b2 L + (1 - b2) G QR diag(1/r) QRᵀ Gᵀ / cols;  R <- b2 R + (1 - b2) Gᵀ QL diag(1/l) QLᵀ G / rows
    l <- b2 l + (1 - b2) mean over cols of (QLᵀ G QR)² / r;  r <- b2 r + (1 - b2) mean over rows of (QLᵀ G QR)² / l
    every `frequency` steps  QL <- orthonormal factor of L QL, QR of R QR

All of the second and third line see the l and r of before. Both decay by (1 - lr λ) before the step, where the code of
KL-Shampoo does it after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.eigen import eigen
from muonlab.optim.kronecker import KroneckerRule, eigenvectors
from muonlab.optim.matrix_view import Kept, MatrixSettings
from muonlab.optim.muon_stages import cols_of, rows_of
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.rules import register_rule
from muonlab.optim.whole_model import optimizer_of_its_name
from muonlab.settings.check import Average, Count, NonNegative, Positive, Share
from muonlab.settings.optimizer import AdamWGroup

# The least and the most that 1 / sqrt of an eigenvalue is clamped to in KL-Shampoo's code; in between it is the size.
CLAMPS = (10, 4000)


@dataclass(frozen=True, kw_only=True)
class ShampooGroup(MatrixSettings):
    """The settings of one group; `Shampoo` explains them."""

    lr: NonNegative = 0.01
    betas: tuple[Average, Share] = (0.9, 1.0)
    eps: Positive = 1e-12
    weight_decay: NonNegative = 0.0
    frequency: Count = 1


@optimizer_of_its_name
@register_rule("shampoo")
class ShampooRule(KroneckerRule):
    """Shampoo (Gupta et al., arXiv 1802.09568) for the hidden matrices, AdamW for the rest."""

    settings = ShampooGroup
    kept: ClassVar = {"L": rows_of, "R": cols_of, "root_L": rows_of, "root_R": cols_of}
    waits = 0

    def direction(self, s: ShampooGroup, t: int, b1: float, G: Tensor, M: Tensor, kept: Kept) -> Tensor:
        """The covariances with this gradient, their roots where they are due, and M between them."""
        L, R, root_L, root_R = (kept[name] for name in self.kept)
        b2 = s.betas[1]
        new = 1 - b2 if b2 < 1 else 1.0
        L.mul_(b2).add_(G @ G.mT, alpha=new)
        R.mul_(b2).add_(G.mT @ G, alpha=new)
        if t % s.frequency == 0:
            correction = 1 - b2 ** (t + 1) if b2 < 1 else 1.0
            root_L.copy_(inverse_fourth_root(L / correction, s.eps))
            root_R.copy_(inverse_fourth_root(R / correction, s.eps))
        return root_L @ (M / (1 - b1 ** (t + 1))) @ root_R


def inverse_fourth_root(C: Tensor, eps: float) -> Tensor:
    """(C + eps I)^(-1/4) of positive semi-definite matrices (..., n, n)."""
    values, Q = eigen(C.nan_to_num())
    return (Q * (values.clamp_min(0) + eps)[..., None, :] ** -0.25) @ Q.mT


class Shampoo(CombinedOptimizer):
    """Shampoo (arXiv 1802.09568) for matrices; groups with rule="adamw" are updated by AdamW.

    The defaults are those of facebookresearch/optimizers, but without grafting.

    lr: spectral norm of an update, about, while b2 < 1; with sums it falls as 1 / sqrt(steps). 0 changes nothing.
    betas: weights of the past in the average of the gradient, in [0, 1), and in the covariances; 1: sums, as in the
        paper.
    eps: added to the eigenvalues, in units of the gradient squared, above 0.
    weight_decay: the share of a weight lost per step is lr * weight_decay; 0: none.
    frequency: steps from one computation of the roots to the next; 1: every step. Sane: 1 to 100.
    row_blocks, col_blocks, flatten: which blocks have covariances of their own (`muonlab.optim.matrix_view`).
    clip: a `QKClip` that acts after every update, or None.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 1.0),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        frequency: int = 1,
        row_blocks: int | Sequence[int] = 1,
        col_blocks: int = 1,
        flatten: bool = False,
        clip: QKClip | None = None,
    ):
        group = ShampooGroup(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            frequency=frequency,
            row_blocks=row_blocks,
            col_blocks=col_blocks,
            flatten=flatten,
        )
        super().__init__(params, "shampoo", {"shampoo": group, "adamw": AdamWGroup()}, clip)


# ---------------------------------------------------------------- KL-Shampoo
@dataclass(frozen=True, kw_only=True)
class KLShampooGroup(MatrixSettings):
    """The settings of one group; `KLShampoo` explains them."""

    lr: NonNegative = 1e-4
    betas: tuple[Average, Average] = (0.9, 0.98)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.01
    frequency: Count = 10
    initial: Positive = 0.1


def row_values(shape: Sequence[int]) -> tuple[int, ...]:
    """(..., rows)."""
    return tuple(shape[:-1])


def col_values(shape: Sequence[int]) -> tuple[int, ...]:
    """(..., cols)."""
    return (*shape[:-2], shape[-1])


@optimizer_of_its_name
@register_rule("kl_shampoo")
class KLShampooRule(KroneckerRule):
    """KL-Shampoo (Lin et al., arXiv 2509.03378) for the hidden matrices, AdamW for the rest."""

    settings = KLShampooGroup
    kept: ClassVar = {
        "L": rows_of,
        "R": cols_of,
        "QL": rows_of,
        "QR": cols_of,
        "l": row_values,
        "r": col_values,
    }

    def direction(self, s: KLShampooGroup, t: int, b1: float, G: Tensor, M: Tensor, kept: Kept) -> Tensor:
        """D in the eigenbases of the steps before; then covariances, eigenvalues and, where they are due, bases."""
        L, R, QL, QR, l, r = (kept[name] for name in self.kept)
        (rows, cols), b2 = G.shape[-2:], s.betas[1]
        if not t:
            L.lerp_(G @ G.mT / cols, 1 - b2)
            R.lerp_(G.mT @ G / rows, 1 - b2)
            QL.copy_(eigenvectors(L))
            QR.copy_(eigenvectors(R))
            l.fill_(s.initial)
            r.fill_(s.initial)
            return torch.zeros_like(M)
        root_l, root_r = l.rsqrt()[..., :, None], r.rsqrt()[..., None, :]
        E = root_l * root_r
        D = QL @ ((QL.mT @ M @ QR) * (E / (1 + s.eps * E))) @ QR.mT
        by_R, by_L = (G @ QR) * root_r, root_l * (QL.mT @ G)
        L.lerp_(by_R @ by_R.mT / cols, 1 - b2)
        R.lerp_(by_L.mT @ by_L / rows, 1 - b2)
        g = QL.mT @ G @ QR
        l.lerp_((g * root_r).square().mean(-1), 1 - b2)
        r.lerp_((g * root_l).square().mean(-2), 1 - b2)
        l.clamp_(min=clamp(rows) ** -2)
        r.clamp_(min=clamp(cols) ** -2)
        if t % s.frequency == 0:
            QL.copy_(torch.linalg.qr(L.nan_to_num() @ QL).Q)
            QR.copy_(torch.linalg.qr(R.nan_to_num() @ QR).Q)
        return D


def clamp(size: int) -> int:
    """The most that 1 / sqrt of one of `size` eigenvalues may be."""
    least, most = CLAMPS
    return max(least, min(size, most))


class KLShampoo(CombinedOptimizer):
    """KL-Shampoo (arXiv 2509.03378) for matrices; groups with rule="adamw" are updated by AdamW.

    lr: RMS of an entry's change per step, about; 0 changes nothing. Sane: AdamW's.
    betas: weights of the past in the average of the gradient and in covariances and eigenvalues, each in [0, 1).
    eps: added to the root of the product of eigenvalues, in units of the gradient.
    weight_decay: the share of a weight lost per step is lr * weight_decay; 0: none.
    frequency: steps from one power iteration of the eigenvectors to the next; 1: every step. Sane: 1 to 10.
    initial: every eigenvalue at the start, above 0.
    row_blocks, col_blocks, flatten: which blocks have covariances of their own (`muonlab.optim.matrix_view`).
    clip: a `QKClip` that acts after every update, or None.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        frequency: int = 10,
        initial: float = 0.1,
        row_blocks: int | Sequence[int] = 1,
        col_blocks: int = 1,
        flatten: bool = False,
        clip: QKClip | None = None,
    ):
        group = KLShampooGroup(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            frequency=frequency,
            initial=initial,
            row_blocks=row_blocks,
            col_blocks=col_blocks,
            flatten=flatten,
        )
        super().__init__(params, "kl_shampoo", {"kl_shampoo": group, "adamw": AdamWGroup()}, clip)
