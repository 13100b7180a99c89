"""What some Muons do around the orthogonalisation to even out neurons: three steps, each off by default.

All take and return stacks (..., rows, cols).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def equilibrate_rows(direction: Tensor) -> Tensor:
    """Before it: every row gets the RMS row norm (MuonEq, arXiv 2603.28254). Zero rows stay zero."""
    largest = direction.abs().amax((-2, -1), keepdim=True)
    direction = direction / torch.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    row_norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    target = row_norm.square().mean(-2, keepdim=True).sqrt()
    return direction * torch.where(row_norm > 0, target / row_norm, 0.0)


def renormalise(update: Tensor) -> Tensor:
    """After it: Frobenius norm sqrt(min(rows, cols)), an orthogonal matrix's (Muon+, arXiv 2602.21545)."""
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    return update * (min(update.shape[-2:]) ** 0.5 / norm.clamp_min(1e-6))


def second_moment_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of `normalise_neurons`' state: one number per row of tall and square matrices, else per column."""
    *stack, rows, cols = shape
    return (*stack, rows, 1) if rows >= cols else (*stack, 1, cols)


def normalise_neurons(update: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """After it: divide each neuron by its running RMS (NorMuon, arXiv 2510.05491, algorithm 1).

    With v_i the mean square of neuron i's entries, s <- beta2 s + (1 - beta2) v and neuron i is divided by
    sqrt(s_i); then all are multiplied by one factor that restores the Frobenius norm. Neurons are rows of
    tall and square matrices and columns of wide ones, as in nanochat (the paper takes rows). Advances
    `second_moment`, of `second_moment_shape` and zero at first.
    """
    along = -1 if second_moment.shape[-1] == 1 else -2
    second_moment.lerp_(update.square().mean(along, keepdim=True), 1 - beta2)
    evened = update * second_moment.clamp_min(1e-10).rsqrt()
    before = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    after = torch.linalg.vector_norm(evened, dim=(-2, -1), keepdim=True)
    return evened * (before / after.clamp_min(1e-10))
