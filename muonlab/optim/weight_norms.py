"""How long an update is, and how long the weight it leads to: the stages `update_norm` and `weight_norm` of Muon.

W is a stack of weights (..., rows, cols), U of scaled updates, and norms are Frobenius norms, one per matrix. "Matrix"
means what is orthogonalised by itself: each expert, each head under `per_head`. `relative` and `fixed` together are
Hyperball: from W <- W - lr ‖W‖ U / ‖U‖ and W <- R W / ‖W‖ with R the norm at the start, W <- R N(W - lr R N(U)).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from muonlab.optim.matrix_view import Kept
from muonlab.optim.muon_stages import one_each
from muonlab.optim.rules import MatrixStages
from muonlab.settings.optimizer import MuonGroup

# From settings, the weight's norm and the update's to a factor on the update.
UPDATE_NORMS: MatrixStages[Callable[[MuonGroup, Tensor, Tensor], Tensor]] = MatrixStages("update_norm")
# From settings, the weight's norm before and after the step and what is kept to a factor on the weight.
WEIGHT_NORMS: MatrixStages[Callable[[MuonGroup, Tensor, Tensor, Kept], Tensor]] = MatrixStages("weight_norm")


@UPDATE_NORMS.register
def scaled(s: MuonGroup, weight: Tensor, update: Tensor) -> Tensor:
    """1: as long as `scale_rule` makes it."""
    return torch.ones_like(update)


@UPDATE_NORMS.register
def relative(s: MuonGroup, weight: Tensor, update: Tensor) -> Tensor:
    """‖W‖ / ‖U‖: lr is the length of a step over that of the weight (Hyperball, arXiv 2606.16899)."""
    return torch.where(update > 0, weight / update, 1.0)


@UPDATE_NORMS.register
def floor(s: MuonGroup, weight: Tensor, update: Tensor) -> Tensor:
    """max(1, floor ‖W‖ / ‖U‖): updates shorter than that share of the weight are stretched to it.

    Track 3 of modded-nanogpt, by its code, in place of weight decay, under `original`.
    """
    return torch.where(update > 0, s.value("floor", "floor") * weight / update, 1.0).clamp_min(1.0)


@WEIGHT_NORMS.register
def free(s: MuonGroup, before: Tensor, after: Tensor, kept: Kept) -> Tensor:
    """1: wherever the step leads."""
    return torch.ones_like(after)


@WEIGHT_NORMS.keeping(radius=one_each)
def fixed(s: MuonGroup, before: Tensor, after: Tensor, kept: Kept) -> Tensor:
    """R / ‖W‖, R being the norm before the first step (Hyperball, arXiv 2606.16899).

    R is kept, so what else shortens a weight, such as QK-Clip, is undone by the next step. Code in track 3 takes the
    norm before this step instead, which forgets it.
    """
    radius = kept["radius"]
    radius.copy_(torch.where(radius > 0, radius, before))
    return torch.where(after > 0, radius / after, 1.0)


@WEIGHT_NORMS.register
def brake(s: MuonGroup, before: Tensor, after: Tensor, kept: Kept) -> Tensor:
    """Of what the norm would grow by, the share `outward` remains: ‖W'‖ = ‖W‖ + outward (‖W + dW‖ - ‖W‖).

    NVIDIA's Emerging-Optimizers, by its code; track 3 scales the part of the update along W before its floor.
    """
    slower = before + s.value("outward", "brake") * (after - before)
    return torch.where(after > before, slower / after, 1.0)
