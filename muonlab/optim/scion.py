"""Scion: linear minimisation oracles over norm balls, one norm a role. Pethick et al., arXiv 2502.07529, algorithm 1.

    M <- mu M + (1 - mu) G
    W <- (1 - lr λ) W - lr radius LMO(M)

λ = 1 is the paper's constrained form, in which weights stay in the ball of their radius; λ = 0 the unconstrained one.
LMO (table 2 there and the authors' code), with every norm as in the code, so that updates are alike at every width:

    spectral   sqrt(rows / cols) U Vᵀ of M = U S Vᵀ, by Newton-Schulz      hidden matrices
    rows       each row over its RMS; a vector is one row                   embeddings, gains and biases
    sign       sign(M) / cols                                               the head
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from muonlab.errors import MuonlabError
from muonlab.optim.adamw_rule import decay_and_step
from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.matrix_view import Group, MatrixSettings
from muonlab.optim.muon_rule import spectral
from muonlab.optim.newton_schulz import orthogonalise
from muonlab.optim.optimizers import register_optimizer
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.ranks import is_sharded
from muonlab.optim.routing import parameter_groups
from muonlab.optim.rules import Batch, Rule, register_rule
from muonlab.optim.weight_averages import WeightAverages
from muonlab.settings.check import Average, NonNegative
from muonlab.settings.optimizer import AverageSettings, RoutingSettings

HIDDEN_RADIUS, SIGN_RADIUS = 50.0, 3000.0  # of NanoGPT's hidden matrices and its head, tied to the embedding


@dataclass(frozen=True, kw_only=True)
class ScionGroup:
    """The settings of one group; `Scion` explains them."""

    lr: NonNegative = 2**-12
    momentum: Average = 0.9
    weight_decay: NonNegative = 1.0
    radius: NonNegative = HIDDEN_RADIUS


@dataclass(frozen=True, kw_only=True)
class ScionMatrixGroup(ScionGroup, MatrixSettings):
    """Those of a group of hidden matrices."""


@dataclass(frozen=True, kw_only=True)
class ScionTableGroup(ScionGroup):
    """Those of a group of tables of rows, or of vectors."""

    radius: NonNegative = SIGN_RADIUS
    norm: Literal["rows", "sign"] = "sign"


@register_rule("scion")
class ScionRule(Rule):
    """Scion with the spectral norm, for hidden matrices."""

    settings = ScionMatrixGroup
    buffers = ("momentum_buffer",)

    def update(self, batch: Batch) -> None:
        """M, then sqrt(rows / cols) U Vᵀ by five steps with Jordan's coefficients, as in the authors' code."""
        s = batch.settings(ScionMatrixGroup)
        for part in batch.by_shape():
            m = part.buffers("momentum_buffer")
            torch._foreach_lerp_(m, part.grads, 1 - s.momentum)
            matrices = part.matrices(m)
            O = orthogonalise(matrices.stacks, "jordan", None, None, "auto", out=None)
            O = [each * (s.radius * spectral(*each.shape[-2:])) for each in O]
            decay_and_step(part.params, matrices.join(O), s.lr, s.weight_decay)


@register_rule("scion_table")
class ScionTableRule(Rule):
    """Scion with the norms of embeddings, head, gains and biases."""

    settings = ScionTableGroup
    buffers = ("momentum_buffer",)

    def update(self, batch: Batch) -> None:
        """M, then its rows over their RMS, or its signs over the number of columns."""
        s, m = batch.settings(ScionTableGroup), batch.buffers("momentum_buffer")
        torch._foreach_lerp_(m, batch.grads, 1 - s.momentum)
        lmo = sign if s.norm == "sign" else rows
        D = [s.radius * lmo(each, W) for each, W in zip(m, batch.whole, strict=True)]
        decay_and_step(batch.params, D, s.lr, s.weight_decay)

    def check_parameter(self, param: Tensor, name: str, group: Group) -> None:
        """Raise MuonlabError for a tensor that is no table, and for one whose rows are cut over ranks."""
        if param.ndim > 2:
            raise MuonlabError(
                f"scion_table takes tables of rows and vectors, not {name} of shape {tuple(param.shape)}; use a group"
                " with rule='scion' for matrices, or another rule"
            )
        if is_sharded(param) and not all(each.is_shard(0) for each in param.placements):  # type: ignore[attr-defined]
            raise MuonlabError(
                f"{name} is spread over ranks as {param.placements}; Scion takes rows that are whole on a rank"  # type: ignore[attr-defined]
            )


def sign(M: Tensor, W: Tensor) -> Tensor:
    """sign(M) / cols; a vector has one column."""
    return M.sign() / (W.shape[-1] if W.ndim == 2 else 1)


def rows(M: Tensor, W: Tensor) -> Tensor:
    """Each row of M over its RMS, a vector being one row; zero rows stay zero.

    M is what this rank holds of a tensor of W's shape.
    """
    largest = M.abs().amax(-1, keepdim=True) if M.numel() else M.new_zeros((*M.shape[:-1], 1))
    if cut := W.ndim == 1 and is_sharded(W):
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=W.device_mesh.get_group())  # type: ignore[attr-defined]
    M = M / torch.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    total = M.square().sum(-1, keepdim=True)
    if cut:
        dist.all_reduce(total, group=W.device_mesh.get_group())  # type: ignore[attr-defined]
    return M * torch.where(total > 0, (W.shape[-1] / total).sqrt(), 0.0)


class Scion(CombinedOptimizer):
    """Scion (arXiv 2502.07529) for matrices; groups with rule="scion_table" are embeddings, heads and vectors.

    params: matrices, (name, matrix) pairs, or groups. A group {"params": [...], "rule": "scion_table", "norm": ...} has
        tables of rows or vectors: norm "rows" for embeddings, gains and biases, "sign" for a head.
    lr: share of its radius that a weight moves by; 0 changes nothing. Sane: 1e-4 to 1e-3.
    momentum: weight of the past, in [0, 1); the paper's 1 - alpha. 0 uses every gradient by itself.
    weight_decay: 1 is the constrained form of the paper, 0 the unconstrained one.
    radius: of the norm ball of matrices, in units of the norm; that of tables is the group's, 3000 by default.
    clip: a `QKClip` that acts after every update, or None.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2**-12,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1.0,
        radius: float = HIDDEN_RADIUS,
        clip: QKClip | None = None,
    ):
        group = ScionGroup(lr=lr, momentum=momentum, weight_decay=weight_decay, radius=radius)
        super().__init__(params, "scion", _by_rule(group), clip)


@dataclass(frozen=True, kw_only=True)
class ScionSettings(ScionGroup, RoutingSettings, AverageSettings):
    """Scion for every parameter, under the norm of its role.

    rows_radius: of embeddings, gains and biases; the paper's model ties embedding and head and has none of the others,
        so this is the radius of hidden matrices. sign_radius: of head, router and gates.
    """

    name: Literal["scion"] = "scion"
    rows_radius: NonNegative = HIDDEN_RADIUS
    sign_radius: NonNegative = SIGN_RADIUS


@register_optimizer("scion")
def scion(model: nn.Module, settings: ScionSettings) -> CombinedOptimizer:
    """Scion: the spectral norm for hidden matrices, rows for embeddings and vectors, signs for the rest."""
    s = settings
    groups = parameter_groups(
        model, "scion", s.routes, s.lr_scale, s.per_head, s.split_qkv, rest="scion_table"
    )
    for group in groups:
        if group["rule"] == "scion_table":
            by_rows = group["params"][0][1].ndim < 2 or group["name"].startswith("embedding")
            group["norm"] = "rows" if by_rows else "sign"
            group["radius"] = s.rows_radius if by_rows else s.sign_radius
    return CombinedOptimizer(groups, "scion", _by_rule(s), averages=WeightAverages.of(s))


def _by_rule(s: ScionGroup) -> dict[str, object]:
    """The settings of both rules; the radius is that of matrices."""
    matrix = ScionMatrixGroup(lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, radius=s.radius)
    table = ScionTableGroup(lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    return {"scion": matrix, "scion_table": table}
