"""Schedule-free AdamW: Defazio et al., arXiv 2405.15682, as in the authors' package schedulefree 1.4.1.

Three sequences: z is stepped, x is the average of the z, and gradients are taken at y between them, which is where the
parameters are in training. With lr the rate of this step, p and r the powers of the average's weights,

    v <- b2 v + (1 - b2) g²;  d = g / (sqrt(v / (1 - b2^t)) + eps) + λ y
    w = t^r (largest lr so far)^p;  c = w / (sum of all w)
    y <- (1 - c) y + c z + lr (b1 (1 - c) - 1) d;  z <- z - lr d
    x = y + (1 - 1/b1) (z - y)

The paper's Algorithm 1 multiplies lr by sqrt(1 - b2^t) instead of correcting v, which the weights w and the decay then
follow too; the package, in 1.4, does not.

Within `optimizer.averaged()` the parameters are x, where evaluation belongs; training and checkpoints have y.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Lt
from torch import Tensor
from torch.optim.optimizer import ParamsT

from muonlab.optim.adamw_rule import one_minus_power
from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.matrix_view import Group, State
from muonlab.optim.ranks import local_part
from muonlab.optim.rules import Batch, Rule, register_rule
from muonlab.optim.whole_model import optimizer_of_its_name
from muonlab.settings.check import Average, NonNegative


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeGroup:
    """The settings of one group; `ScheduleFreeAdamW` explains them."""

    lr: NonNegative = 2.5e-3
    betas: tuple[Annotated[float, Gt(0), Lt(1)], Average] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    r: NonNegative = 0.0
    weight_lr_power: NonNegative = 2.0


@optimizer_of_its_name
@register_rule("schedulefree_adamw")
class ScheduleFreeRule(Rule):
    """Schedule-free AdamW (Defazio et al., arXiv 2405.15682)."""

    settings = ScheduleFreeGroup
    buffers = ("z", "exp_avg_sq")
    numbers: ClassVar = {"step": 0.0, "weight_sum": 0.0, "largest_lr": 0.0}

    def update(self, batch: Batch) -> None:
        """One step of y and z; entries do not depend on each other."""
        s, betas, names = batch.settings(ScheduleFreeGroup), batch.betas, (*self.buffers, *self.numbers)
        entries = [batch.buffers(name) for name in names]
        for y, g, z, v, t, total, largest in zip(batch.params, batch.grads, *entries, strict=True):
            t.add_(1)
            steps = t.to(y.dtype)
            largest.copy_(torch.maximum(largest, torch.zeros_like(largest) + s.lr))
            weight = steps**s.r * largest.to(y.dtype) ** s.weight_lr_power
            total.add_(weight)
            c = torch.where(total > 0, weight / total.to(y.dtype), 0.0)
            v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            d = g / ((v / one_minus_power(betas[1], steps)).sqrt() + s.eps) + s.weight_decay * y
            y.lerp_(z, c).add_(d * (s.lr * (betas[0] * (1 - c) - 1)))
            z.sub_(d * s.lr)

    def init_state(self, param: Tensor, dtype: torch.dtype) -> State:
        """z begins at the weights."""
        return super().init_state(param, dtype) | {"z": param.detach().to(dtype, copy=True)}

    def readout(self, W: Tensor, state: State, group: Group) -> Tensor:
        """x, the average of all z."""
        z = local_part(state["z"])
        y = W.to(z.dtype)
        return y + (1 - 1 / group.get("momentum", group["betas"][0])) * (z - y)


class ScheduleFreeAdamW(CombinedOptimizer):
    """AdamW whose average needs no decay of the learning rate (arXiv 2405.15682).

    Evaluate within `with optimizer.averaged():`. A warm-up is a scheduler's; without a clip, which would act on y
    alone.

    lr: RMS of an entry's change per step, early on; 0 changes nothing. Sane: 1 to 3 times AdamW's.
    betas: how near y is to x, in (0, 1), and the weight of the past in the average of squares, in [0, 1).
    eps: added to the root of the squares, in units of the gradient.
    weight_decay: the share of a weight lost per step is lr * weight_decay; 0: none.
    r: steps count in the average by the power r of their number; 0: all alike.
    weight_lr_power: and by this power of the largest rate so far; 0: a warm-up counts like the rest.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2.5e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ):
        group = ScheduleFreeGroup(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            r=r,
            weight_lr_power=weight_lr_power,
        )
        super().__init__(params, "schedulefree_adamw", {"schedulefree_adamw": group})
