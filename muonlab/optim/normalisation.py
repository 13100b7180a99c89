"""Scaling a matrix so that its singular values start in (0, 1], whatever the size of the gradient."""

import torch
from torch import Tensor

# Below this an fp32 or fp64 maximum has no finite reciprocal. Matrices of such tiny entries are scaled by the
# reciprocal of the limit instead, which brings the smallest denormal back to normal numbers all the same.
_SMALLEST = {torch.float32: 2.0**-120, torch.float64: 2.0**-1000}


def frobenius_normalise_(X: Tensor, margin: float = 1.0) -> Tensor:
    """Divide every matrix of a stack (..., rows, cols) by margin times its Frobenius norm, in place.

    X must be fp32 or fp64: half precisions cannot hold the sum of squares. The entries are first divided by
    their largest magnitude, so no finite matrix overflows or underflows and there is no epsilon that would
    shrink the update of small gradients. A zero matrix stays zero; infinite or NaN entries give NaN.
    """
    scale_to_unit_(X)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    # no norm but that of a zero matrix lies below 2^-75 now: a denormal over _SMALLEST is at least that
    return X.mul_(norm.mul_(margin).clamp_min_(2.0**-80).reciprocal_())


def scale_to_unit_(X: Tensor) -> Tensor:
    """Divide every matrix of an fp32 or fp64 stack by its largest magnitude, in place."""
    largest = torch.maximum(X.amax((-2, -1), keepdim=True), X.amin((-2, -1), keepdim=True).neg_())
    return X.mul_(largest.clamp_min_(_SMALLEST[X.dtype]).reciprocal_())


def aol_rescale_(X: Tensor, margin: float = 1.0) -> Tensor:
    """Almost-orthogonal rescaling of the short side of a stack (..., rows, cols), in place, fp32 or fp64.

    X <- diag(s) X for a wide X, s_i = (Σ_j |X Xᵀ|_ij)^(-1/2), and the same on columns for a tall one; after
    it no singular value exceeds 1 / margin (Prach and Lampert, arXiv 2208.03160; as a start for
    Newton-Schulz: Turbo-Muon, arXiv 2512.04632). This is not a multiple of X: the iteration goes to the
    polar factor of the rescaled matrix. A square matrix is rescaled by rows. Zero rows stay zero.
    """
    scale_to_unit_(X)
    short = X.mT if X.shape[-2] > X.shape[-1] else X
    sums = (short @ short.mT).abs_().sum(-1, keepdim=True)
    short.mul_((sums.where(sums > 0, 1.0) * margin**2).rsqrt_())
    return X
