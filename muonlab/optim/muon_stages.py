"""What Muon does to whole matrices around the iteration: the stages that `before` and `after` chain by name.

With D the momentum's direction (..., rows, cols), O = polar(D) its orthogonal factor as the iteration finds it, and G
the gradient of this step, a stage before it maps D to D, one after it O to O. Every one is a function of its equation;
what it keeps between steps stands in its decorator. A stage that brings a matrix to a norm gives it an orthogonal
matrix's, sqrt(min(rows, cols)), or that which it had, so that lr keeps its unit; the scale comes after. No stage needs
an epsilon against small gradients: each divides by what it is about to compare with.

Where a source only has code, or its equation could not be read, the docstring says so.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from muonlab.optim.eigen import eigen
from muonlab.optim.matrix_view import Kept
from muonlab.optim.newton_schulz import orthogonalise
from muonlab.optim.rules import MatrixStages
from muonlab.settings.optimizer import MuonGroup

Stage = Callable[[MuonGroup, Tensor, Tensor, Kept], Tensor]  # settings, D, G, kept -> D
After = Callable[[MuonGroup, Tensor, Tensor, Tensor, Kept], Tensor]  # settings, O, D, G, kept -> O
# A stage that reads no gradient is given D in G's place.
BEFORE: MatrixStages[Stage] = MatrixStages("before")
AFTER: MatrixStages[After] = MatrixStages("after")

AURORA_ITERATIONS = 2  # polar factors, the last one included; their damping is the exponent 0.5
SMALLEST_VARIANCE = 1e-6  # PMuon: the least eigenvalue of a covariance, over their mean
OPERATOR_NORM_STEPS = 10  # Contra-Muon: of the power iteration; its sources take 5


def polar(s: MuonGroup, matrices: list[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
    """U f(S) Vᵀ near U Vᵀ of each stack U S Vᵀ, by the iteration that the settings name."""
    dtype = s.ns_dtype if s.ns_dtype in (None, "auto") else getattr(torch, s.ns_dtype)
    return orthogonalise(matrices, s.ns_schedule, s.ns_steps, dtype, s.ns_backend, out)


# ---------------------------------------------------------------- shapes of what is kept of a stack (..., rows, cols)
def one_each(shape: Sequence[int]) -> tuple[int, ...]:
    """(..., 1, 1): a number for every matrix."""
    return (*shape[:-2], 1, 1)


def entries_of(shape: Sequence[int]) -> tuple[int, ...]:
    """(..., rows, cols): a number for every entry."""
    return tuple(shape)


def rows_of(shape: Sequence[int]) -> tuple[int, ...]:
    """(..., rows, rows)."""
    return (*shape[:-2], shape[-2], shape[-2])


def cols_of(shape: Sequence[int]) -> tuple[int, ...]:
    """(..., cols, cols)."""
    return (*shape[:-2], shape[-1], shape[-1])


def neurons_of(shape: Sequence[int]) -> tuple[int, ...]:
    """One number per row of tall and square matrices, else per column."""
    *stack, rows, cols = shape
    return (*stack, rows, 1) if rows >= cols else (*stack, 1, cols)


# ---------------------------------------------------------------- before
@BEFORE.register
def equilibrate_rows(s: MuonGroup, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """Every row gets the RMS row norm (MuonEq, arXiv 2603.28254). Zero rows stay zero."""
    D = _to_unit(D)
    row_norm = torch.linalg.vector_norm(D, dim=-1, keepdim=True)
    target = row_norm.square().mean(-2, keepdim=True).sqrt()
    return D * torch.where(row_norm > 0, target / row_norm, 0.0)


@BEFORE.register
def sign(s: MuonGroup, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """sign(D), entry by entry: AdaMuon's first half (arXiv 2507.11005, and the authors' code)."""
    return D.sign()


@BEFORE.keeping(gradient=True, root_square=entries_of)
def muon2(s: MuonGroup, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """D / sqrt(v), v <- beta2 v + (1 - beta2) G² (Muon², arXiv 2604.09967, by its abstract and the code of track 3).

    sqrt(v) is kept, because squares of gradients overflow and vanish. Adam's correction of v would be one factor, which
    the polar factor does not see. Entries that never had a gradient stay 0.
    """
    beta2, root = s.value("beta2", "muon2"), kept["root_square"]
    root.copy_(torch.hypot(root * beta2**0.5, G * (1 - beta2) ** 0.5))
    return D / torch.where(root > 0, root, 1.0)


@BEFORE.keeping(gradient=True, host=True, left=rows_of, right=cols_of, peak=one_each)
def pmuon(s: MuonGroup, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """L^-gamma D R^-gamma, L <- beta2 L + G Gᵀ and R <- beta2 R + Gᵀ G (PMuon, by the authors' README in track 3).

    Their code adds the gradient of this step a second time and follows the eigenvectors by one power step; here both
    are exact. L and R are kept over the square of `peak`, the largest entry so far, and share that factor's power,
    which the polar factor does not see. Eigenvalues below 1e-6 of their mean count as that.
    """
    beta2, gamma = s.value("beta2", "pmuon"), s.value("gamma", "pmuon")
    L, R, peak = kept["left"], kept["right"], kept["peak"]
    new_peak = torch.maximum(peak * beta2**0.5, G.abs().amax((-2, -1), keepdim=True))
    scale = torch.where(new_peak > 0, new_peak, 1.0)
    past, G = beta2 * (peak / scale).square(), G / scale
    L.mul_(past).add_(G @ G.mT)
    R.mul_(past).add_(G.mT @ G)
    peak.copy_(new_peak)
    return _inverse_power(L, gamma) @ _to_unit(D) @ _inverse_power(R, gamma)


@BEFORE.register
def aurora(s: MuonGroup, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """diag(d) D, whose polar factor U has rows of nearly one norm, sqrt(cols / rows) of a tall matrix (Aurora).

    d_i = 1 / ‖D_i‖, then d_i <- d_i sqrt((cols / rows) / ‖U_i‖²) with U = polar(diag(d) D); columns for a wide matrix;
    a square one, whose rows have one norm in any case, stays. By the authors' code, tilde-research/aurora-release.
    """
    rows, cols = D.shape[-2:]
    if rows == cols:
        return D
    X = _to_unit(D if rows > cols else D.mT)
    length = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    d = torch.where(length > 0, 1 / length, 0.0)
    for _ in range(AURORA_ITERATIONS - 1):
        [U] = polar(s, [d * X])
        square = U.square().sum(-1, keepdim=True)
        d = d * torch.where(square > 0, min(rows, cols) / max(rows, cols) / square, 0.0).sqrt()
    return d * X if rows > cols else (d * X).mT


# ---------------------------------------------------------------- after
@AFTER.register
def renormalise(s: MuonGroup, O: Tensor, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """O sqrt(min(rows, cols)) / ‖O‖, an orthogonal matrix's norm (Muon+, arXiv 2602.21545)."""
    return O * (min(O.shape[-2:]) ** 0.5 / norm(O).clamp_min(1e-6))


@AFTER.keeping(second_moment=neurons_of)
def normuon(s: MuonGroup, O: Tensor, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """Divide each neuron by its running RMS (NorMuon, arXiv 2510.05491, algorithm 1).

    With v_i the mean square of neuron i's entries, s <- beta2 s + (1 - beta2) v and neuron i is divided by sqrt(s_i);
    then all are multiplied by one factor that restores the Frobenius norm. Neurons are rows of tall and square matrices
    and columns of wide ones, as in nanochat (the paper takes rows).
    """
    second_moment = kept["second_moment"]
    along = -1 if second_moment.shape[-1] == 1 else -2
    second_moment.lerp_(O.square().mean(along, keepdim=True), 1 - s.value("beta2", "normuon"))
    evened = O * second_moment.clamp_min(1e-10).rsqrt()
    return evened * (norm(O) / norm(evened).clamp_min(1e-10))


@AFTER.keeping(entry_square=entries_of)
def adamuon(s: MuonGroup, O: Tensor, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """O / (sqrt(v) + 1e-8), v <- beta2 v + (1 - beta2) O², brought to sqrt(min(rows, cols)) (AdaMuon, 2507.11005).

    The authors' 0.2 sqrt(rows cols) / ‖O‖ is this times `match_rms_adamw`. pytorch_optimizer and Emerging-Optimizers
    leave out the sign before it (`before=[sign]`), the latter the norm too.
    """
    v = kept["entry_square"].lerp_(O.square(), 1 - s.value("beta2", "adamuon"))
    O = O / (v.sqrt() + 1e-8)
    return O * (min(O.shape[-2:]) ** 0.5 / norm(O).clamp_min(1e-10))


@AFTER.keeping(gradient=True, root_norm=one_each, steps=one_each, gain=one_each)
def namo(s: MuonGroup, O: Tensor, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """alpha O, alpha = sqrt(1 - beta2^t) / (1 - momentum^t) ‖D‖ / sqrt(v), v <- beta2 v + (1 - beta2) ‖G‖² (NAMO).

    arXiv 2602.17080; W decays by lr alpha weight_decay, so `gain` keeps alpha. The authors' code also holds alpha times
    lr and scale below 1. sqrt(v) is kept. t counts steps; a momentum that a schedule changes counts as that of today.
    """
    beta2, root, t = s.value("beta2", "namo"), kept["root_norm"], kept["steps"].add_(1)
    root.copy_(torch.hypot(root * beta2**0.5, _safe_norm(G) * (1 - beta2) ** 0.5))
    correction = (1 - beta2**t).sqrt() / (1 - s.momentum**t)
    alpha = correction * torch.where(root > 0, _safe_norm(D) / root, 0.0)
    return O * kept["gain"].copy_(alpha)


@AFTER.register
def contra(s: MuonGroup, O: Tensor, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """O - contra/2 D / ‖D‖_op, with the norm that O had (Contra-Muon, by its README and code in track 3).

    Their power iteration starts at a vector of ones, which a leading direction may be orthogonal to; here it starts at
    the longest row.
    """
    D = _to_unit(D)
    pushed = O - s.value("contra", "contra") / 2 * D / _operator_norm(D).clamp_min(1e-10)
    return pushed * (norm(O) / norm(pushed).clamp_min(1e-10))


@AFTER.register
def spectral_power(s: MuonGroup, O: Tensor, D: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """O (Dᵀ D)^(power/2) = U S^power Vᵀ, with the norm that O had (DynMuon, arXiv 2605.17109, Muon^p, 2606.13867).

    The papers keep S in the gradient's unit, which changes lr with it. 0 is Muon, 1 the momentum itself, below 0 small
    directions get more than large ones. Eigenvalues below the rounding of the largest count as that.
    """
    X = _to_unit(D) if D.shape[-2] >= D.shape[-1] else _to_unit(D).mT
    squares, V = torch.linalg.eigh(X.mT @ X)
    squares = squares.clamp_min(squares[..., -1:] * torch.finfo(X.dtype).eps).clamp_min(1e-30)
    power = (V * squares.pow(s.value("power", "spectral_power") / 2).unsqueeze(-2)) @ V.mT
    shaped = O @ power if D.shape[-2] >= D.shape[-1] else power @ O
    return shaped * (norm(O) / norm(shaped).clamp_min(1e-10))


# ---------------------------------------------------------------- norms and powers of stacks
def norm(X: Tensor) -> Tensor:
    """(..., 1, 1): the Frobenius norm of every matrix."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)


def _largest(X: Tensor) -> Tensor:
    """(..., 1, 1): the largest magnitude of every matrix, 1 of a zero one."""
    largest = X.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def _to_unit(X: Tensor) -> Tensor:
    """Every matrix over its largest magnitude: squares neither overflow nor vanish."""
    return X / _largest(X)


def _safe_norm(X: Tensor) -> Tensor:
    """`norm` of matrices of any finite size."""
    return norm(_to_unit(X)) * _largest(X)


def _operator_norm(X: Tensor) -> Tensor:
    """(..., 1, 1): the largest singular value, from below."""
    longest = torch.linalg.vector_norm(X, dim=-1, keepdim=True).argmax(-2, keepdim=True)
    v = X.take_along_dim(longest, -2).mT
    for _ in range(OPERATOR_NORM_STEPS):
        v = X.mT @ (X @ v)
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(1e-10)
    return torch.linalg.vector_norm(X @ v, dim=-2, keepdim=True)


def _inverse_power(A: Tensor, exponent: float) -> Tensor:
    """A^-exponent of positive semidefinite matrices."""
    values, vectors = eigen(A)
    floor = (values.mean(-1, keepdim=True) * SMALLEST_VARIANCE).clamp_min(1e-30)
    return (vectors * torch.maximum(values, floor).pow(-exponent).unsqueeze(-2)) @ vectors.mT
