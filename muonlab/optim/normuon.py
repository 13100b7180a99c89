"""What some Muons do around the orthogonalisation to even out rows: three steps, each off by default.

`update` and `direction` are stacks (..., rows, cols).
"""

import torch
from torch import Tensor

_TINY = 1e-30


def equilibrate_rows(direction: Tensor) -> Tensor:
    """Before it: give every row the root-mean-square row norm (MuonEq, arXiv 2603.28254). Zero rows stay zero."""
    direction = direction / direction.abs().amax((-2, -1), keepdim=True).clamp_min(_TINY)
    row_norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    target = row_norm.square().mean(-2, keepdim=True).sqrt()
    return direction * (target / row_norm.clamp_min(1e-6 * target.clamp_min(_TINY)))


def renormalise(update: Tensor) -> Tensor:
    """After it: Frobenius norm sqrt(min(rows, cols)), that of an exactly orthogonal matrix (Muon+, arXiv 2602.21545)."""
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    return update * (min(update.shape[-2:]) ** 0.5 / norm.clamp_min(1e-6))


def second_moment_like(stack: Tensor) -> Tensor:
    """Zero second moments: one per row of a tall or square matrix, one per column of a wide one."""
    rows, cols = stack.shape[-2:]
    return stack.new_zeros((*stack.shape[:-1], 1) if rows >= cols else (*stack.shape[:-2], 1, cols))


def normalise_neurons(update: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """After it: divide each neuron by its running RMS, keeping the Frobenius norm (NorMuon, arXiv 2510.05491, algorithm 1).

    With v_i the mean square of neuron i's entries: s <- beta2 s + (1 - beta2) v, update_i / sqrt(s_i), then all
    rescaled to the old norm. A neuron is a row of a tall or square matrix and a column of a wide one, as in
    nanochat. `second_moment` is advanced in place.
    """
    dim = -1 if second_moment.shape[-1] == 1 else -2
    second_moment.lerp_(update.square().mean(dim, keepdim=True), 1 - beta2)
    normalised = update * second_moment.clamp_min(1e-10).rsqrt()
    old = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    new = torch.linalg.vector_norm(normalised, dim=(-2, -1), keepdim=True)
    return normalised * (old / new.clamp_min(1e-10))
