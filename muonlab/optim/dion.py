"""Dion: the momentum's leading directions by one power step a step, the rest kept for later (arXiv 2504.05295).

    B = M + G;  P = orthonormal basis of B Q;  R = Bᵀ P                (rows, r), (cols, r)
    M <- B - (1 - momentum) P Rᵀ                                       what was taken, less of it: error feedback
    Q <- R with columns of length 1
    W <- (1 - lr λ) W - lr sqrt(rows / cols) P Qᵀ

Algorithm 1 of the paper, by the authors' dion_simple.py. Theirs adds 1e-8 to the length of a column, which hides
gradients of that size; here a column of zeros stays zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from muonlab.optim.adamw_rule import decay_and_step
from muonlab.optim.matrix_view import Group, MatrixSettings, MatrixView, entry_name
from muonlab.optim.muon_rule import spectral
from muonlab.optim.rules import Batch, Rule, register_rule
from muonlab.optim.whole_model import optimizer_of_its_name
from muonlab.settings.check import Average, NonNegative, Share


@dataclass(frozen=True, kw_only=True)
class DionSettings(MatrixSettings):
    """lr: the largest RMS-to-RMS operator norm of an update; 0 changes nothing. Sane: 0.005 to 0.05.
    momentum: weight of the past, in [0, 1). weight_decay: the share of a weight lost per step is lr weight_decay.
    rank_fraction: r over the shorter side, at least one direction; 1: all of them, and close to Muon. The authors'
        default is 1, and they find 0.25 as good from 3B parameters on.
    """

    lr: NonNegative = 0.01
    momentum: Average = 0.95
    weight_decay: NonNegative = 0.01
    rank_fraction: Share = 0.25


@optimizer_of_its_name
@register_rule("dion")
class DionRule(Rule):
    """Dion for the hidden matrices, AdamW for the rest."""

    settings = DionSettings
    buffers = ("momentum_buffer",)

    def update(self, batch: Batch) -> None:
        """One step. The basis Q of every matrix is whole on every rank."""
        s = batch.settings(DionSettings)
        for part in batch.by_shape():
            M = part.buffers("momentum_buffer")
            torch._foreach_add_(M, part.grads)
            self._first_bases(part)
            matrices = part.matrices(M, ("basis",))
            updates, rests = [], []
            for B, kept in zip(matrices.stacks, matrices.kept, strict=True):
                U, taken = leading(B, kept["basis"])
                updates.append(U * spectral(*B.shape[-2:]))
                rests.append(B - (1 - s.momentum) * taken)
            O = matrices.join(updates)
            torch._foreach_copy_(M, matrices.join(rests))
            decay_and_step(part.params, O, s.lr, s.weight_decay)

    def state_shapes(self, shape: torch.Size, group: Group) -> dict[str, tuple[int, ...] | None]:
        """The momentum, and the basis of every block of matrices."""
        blocks = MatrixView.of(group).block_shapes(shape)
        bases = {entry_name("basis", j): basis_shape(block, group) for j, block in enumerate(blocks)}
        return {**super().state_shapes(shape, group), **bases}

    def _first_bases(self, part: Batch) -> None:
        """Random, the same on every rank and in every run: one step makes them the momentum's own."""
        for state, group, W, g in zip(part.states, part.groups, part.whole, part.grads, strict=True):
            for j, block in enumerate(MatrixView.of(group).block_shapes(W.shape)):
                if entry_name("basis", j) not in state:
                    start = torch.randn(basis_shape(block, group), generator=torch.Generator().manual_seed(0))
                    state[entry_name("basis", j)] = start.to(g)


def leading(B: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """P Qᵀ of the new Q, which is written over the old, and P Rᵀ."""
    largest = B.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    unit = B / largest  # squares neither overflow nor vanish
    P, _ = torch.linalg.qr(unit @ Q)
    R = unit.mT @ P
    length = torch.linalg.vector_norm(R, dim=-2, keepdim=True)
    Q.copy_(torch.where(length > 0, R / length, 0.0))
    return P @ Q.mT, (P @ R.mT) * largest


def basis_shape(block: tuple[int, ...], group: Group) -> tuple[int, ...]:
    """(..., cols, r)."""
    *stack, rows, cols = block
    return (*stack, cols, max(1, round(group["rank_fraction"] * min(rows, cols))))
