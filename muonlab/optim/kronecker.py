"""SOAP and SOAP-Muon, and what they share with Shampoo: a covariance of the rows and one of the columns of a matrix.

With G (rows, cols) the gradient of this step, M its average, and QL, QR the eigenvectors of L and R, SOAP (Vyas et al.,
arXiv 2409.11321, algorithm 3, with the first step and the bias correction of the authors' code) is Adam in their basis:

    M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) (QLᵀ G QR)²
    D = sqrt(1 - b2^t) / (1 - b1^t)  QL ((QLᵀ M QR) / (sqrt(V) + eps)) QRᵀ
    W <- (1 - lr λ) W - lr D
    L <- b2 L + (1 - b2) G Gᵀ;  R <- b2 R + (1 - b2) Gᵀ G
    every `frequency` steps  QL <- orthonormal factor of L QL, QR of R QR: one step of a power iteration

The first gradient begins L and R alone, so that no gradient is seen in a basis of its own. SOAP-Muon takes the polar
factor of D for the update, as rows of modded-nanogpt's track 3 do (by their descriptions).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from muonlab.optim.adamw_rule import decay_and_step
from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.eigen import eigen
from muonlab.optim.matrix_view import Group, Kept, MatrixSettings, MatrixView, State, entry_name
from muonlab.optim.muon_rule import match_rms_adamw
from muonlab.optim.muon_stages import cols_of, entries_of, rows_of
from muonlab.optim.newton_schulz import orthogonalise
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.rules import Batch, Rule, ShapeOf, register_rule
from muonlab.optim.whole_model import optimizer_of_its_name
from muonlab.settings.check import Average, Count, NonNegative
from muonlab.settings.optimizer import AdamWGroup

LARGEST = 1e12  # an entry of a gradient beyond it counts as it: squares of sums of such are finite in fp32


class KroneckerRule(Rule):
    """A rule with covariances of rows and columns, which every rank keeps whole, of every block of matrices.

    kept: the shapes of the entries that `direction` keeps of a stack (..., rows, cols), zero at first.
    waits: for how many gradients of a parameter there is no update.
    """

    buffers = ("exp_avg",)
    kept: ClassVar[Mapping[str, ShapeOf]]
    waits: ClassVar[int] = 1

    def update(self, batch: Batch) -> None:
        """One step of every parameter that has seen enough gradients."""
        s: Any = batch.settings(self.settings)
        b1 = batch.betas[0]
        for t, same in batch.by_number("step"):
            for part in same.by_shape():
                self._begin(part)
                g = [torch.where(each.isfinite(), each.clamp(-LARGEST, LARGEST), each) for each in part.grads]
                m = part.buffers("exp_avg")
                if t >= self.waits:
                    torch._foreach_lerp_(m, g, 1 - b1)
                G, M = part.matrices(g, tuple(self.kept)), part.matrices(m)
                each = zip(G.stacks, M.stacks, G.kept, strict=True)
                D = G.join(self.whole_update(s, [self.direction(s, t, b1, *one) for one in each]))
                if t >= self.waits:
                    decay_and_step(part.params, D, s.lr, s.weight_decay)
                for state in part.states:
                    state["step"] = t + 1

    @abstractmethod
    def direction(self, s: Any, t: int, b1: float, G: Tensor, M: Tensor, kept: Kept) -> Tensor:
        """D of a stack, `t` gradients having been seen before this one; advances what is kept."""

    def whole_update(self, s: Any, D: list[Tensor]) -> Sequence[Tensor]:
        """The updates of all stacks, from their directions."""
        return D

    def _begin(self, part: Batch) -> None:
        for state, view, W, g in zip(part.states, part.views, part.whole, part.grads, strict=True):
            for j, block in enumerate(view.block_shapes(W.shape)):
                for entry, shape_of in self.kept.items():
                    if entry_name(entry, j) not in state:
                        state[entry_name(entry, j)] = g.new_zeros(shape_of(block))

    def state_shapes(self, shape: torch.Size, group: Group) -> dict[str, tuple[int, ...] | None]:
        """The average gradient, the number of gradients, and what is kept of every block."""
        kept = {
            entry_name(entry, j): shape_of(block)
            for j, block in enumerate(MatrixView.of(group).block_shapes(shape))
            for entry, shape_of in self.kept.items()
        }
        return {**super().state_shapes(shape, group), "step": None, **kept}

    def required_state(self) -> tuple[str, ...]:
        """The average gradient, the number of gradients, and what is kept of the first block."""
        return (*self.buffers, "step", *(entry_name(entry, 0) for entry in self.kept))

    def host_part(self, group: Group) -> str | None:
        """The count of steps, and the decompositions."""
        return f"rule '{self.name}'"

    def init_state(self, param: Tensor, dtype: torch.dtype) -> State:
        """No gradient so far."""
        return {**super().init_state(param, dtype), "step": 0}


# ---------------------------------------------------------------- SOAP
@dataclass(frozen=True, kw_only=True)
class SOAPGroup(MatrixSettings):
    """The settings of one group; `SOAP` explains them."""

    lr: NonNegative = 3e-3
    betas: tuple[Average, Average] = (0.95, 0.95)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.01
    frequency: Count = 10


@optimizer_of_its_name
@register_rule("soap")
class SOAPRule(KroneckerRule):
    """SOAP (Vyas et al., arXiv 2409.11321) for the hidden matrices, AdamW for the rest."""

    settings = SOAPGroup
    kept: ClassVar = {"L": rows_of, "R": cols_of, "QL": rows_of, "QR": cols_of, "V": entries_of}

    def direction(self, s: SOAPGroup, t: int, b1: float, G: Tensor, M: Tensor, kept: Kept) -> Tensor:
        """Adam in the eigenbasis of the steps before; then the covariances, and their basis where it is due."""
        L, R, QL, QR, V = (kept[name] for name in self.kept)
        b2 = s.betas[1]
        D = torch.zeros_like(M)
        if t:
            V.mul_(b2).addcmul_(g := QL.mT @ G @ QR, g, value=1 - b2)
            correction = (1 - b2**t) ** 0.5 / (1 - b1**t)
            D = QL @ ((QL.mT @ M @ QR) / (V.sqrt() + s.eps)) @ QR.mT * correction
        L.lerp_(G @ G.mT, 1 - b2)
        R.lerp_(G.mT @ G, 1 - b2)
        if not t:
            QL.copy_(eigenvectors(L))
            QR.copy_(eigenvectors(R))
        elif t % s.frequency == 0:
            V.copy_(V.take_along_dim(power_step(L, QL)[..., :, None], -2))
            V.copy_(V.take_along_dim(power_step(R, QR)[..., None, :], -1))
        return D


@optimizer_of_its_name
@register_rule("soap_muon")
class SOAPMuonRule(SOAPRule):
    """SOAP-Muon: the polar factor of SOAP's update for the hidden matrices, AdamW for the rest."""

    def whole_update(self, s: SOAPGroup, D: list[Tensor]) -> Sequence[Tensor]:
        """0.2 sqrt(max(rows, cols)) polar(D), by Newton-Schulz with Jordan's coefficients: lr is AdamW's."""
        O = orthogonalise(D, "jordan", None, None, "auto", out=None)
        return [each * match_rms_adamw(*each.shape[-2:]) for each in O]


def eigenvectors(C: Tensor) -> Tensor:
    """Of symmetric matrices (..., n, n), largest eigenvalue first; any basis where C is not finite."""
    return eigen(C.nan_to_num())[1].flip(-1)


def power_step(C: Tensor, Q: Tensor) -> Tensor:
    """Q <- orthonormal factor of C Q, in the order of qᵀ C q from the largest; that order, of the old columns."""
    CQ = C.nan_to_num() @ Q
    order = (Q * CQ).sum(-2).argsort(-1, descending=True)
    Q.copy_(torch.linalg.qr(CQ.take_along_dim(order[..., None, :], -1)).Q)
    return order


class SOAP(CombinedOptimizer):
    """SOAP (arXiv 2409.11321) for matrices; groups with rule="adamw" are updated by AdamW.

    lr: RMS of an entry's change per step, early on; 0 changes nothing. Sane: AdamW's.
    betas: weights of the past in the average of the gradient, and in those of squares and covariances, each in [0, 1).
    eps: added to the root of the squares, in units of the gradient.
    weight_decay: the share of a weight lost per step is lr * weight_decay; 0: none.
    frequency: steps from one power iteration of the eigenvectors to the next; 1: every step. Sane: 1 to 10.
    row_blocks, col_blocks, flatten: which blocks have covariances of their own (`muonlab.optim.matrix_view`).
    clip: a `QKClip` that acts after every update, or None.
    """

    rule_name: ClassVar[str] = "soap"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        frequency: int = 10,
        row_blocks: int | Sequence[int] = 1,
        col_blocks: int = 1,
        flatten: bool = False,
        clip: QKClip | None = None,
    ):
        group = SOAPGroup(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            frequency=frequency,
            row_blocks=row_blocks,
            col_blocks=col_blocks,
            flatten=flatten,
        )
        super().__init__(params, self.rule_name, {self.rule_name: group, "adamw": AdamWGroup()}, clip)


class SOAPMuon(SOAP):
    """SOAP-Muon: as `SOAP`, with 0.2 sqrt(max(rows, cols)) times the polar factor of its update."""

    rule_name = "soap_muon"
