"""AdamW, for what is not orthogonalised: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.

With g the gradient, t the number of steps with this one, and b1, b2 the betas, every line one stage:

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g²          momentum: averages
    D = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)       transform: adam
    W <- (1 - lr weight_decay) W - lr D                        apply: decay_and_step

Where PyTorch has the four lines as one kernel, on CPU and CUDA, that kernel runs; the stages run elsewhere, and a test
holds the two against each other.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from muonlab.optim.rules import Batch, Rule, register_rule
from muonlab.settings.optimizer import AdamWGroup

FUSED = ("cpu", "cuda")  # kinds of device that have the kernel

Betas = tuple[float, ...]
Tensors = list[Tensor] | tuple[Tensor, ...]  # what torch's foreach functions take


@register_rule("adamw")
class AdamWRule(Rule):
    """The running averages, Adam's direction, decay and step; the settings are explained at `AdamW`."""

    settings = AdamWGroup
    buffers = ("exp_avg", "exp_avg_sq")
    numbers: ClassVar = {"step": 0.0}

    def update(self, batch: Batch) -> None:
        """One step. Entries do not depend on each other, so a rank updates the rows it holds and needs no other.

        Where a scheduler has written a `momentum` into the group, as it does if others of the optimizer's groups have
        one, that is the first beta.
        """
        s, W, g = batch.settings(AdamWGroup), batch.params, batch.grads
        betas = batch.betas
        m, v, t = batch.buffers("exp_avg"), batch.buffers("exp_avg_sq"), batch.buffers("step")
        if W[0].device.type in FUSED:
            _fused(W, g, m, v, t, betas, s)
        else:
            averages(g, m, v, t, betas)
            decay_and_step(W, adam(m, v, t, betas, s.eps), s.lr, s.weight_decay)


def averages(g: list[Tensor], m: list[Tensor], v: list[Tensor], t: list[Tensor], betas: Betas) -> None:
    """m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g² and t <- t + 1, in place."""
    torch._foreach_lerp_(m, g, 1 - betas[0])
    torch._foreach_mul_(v, betas[1])
    torch._foreach_addcmul_(v, g, g, 1 - betas[1])
    torch._foreach_add_(t, 1.0)


def adam(m: list[Tensor], v: list[Tensor], t: list[Tensor], betas: Betas, eps: float) -> list[Tensor]:
    """D = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), t being each parameter's own."""
    return [
        (mean / one_minus_power(betas[0], steps)) / ((square / one_minus_power(betas[1], steps)).sqrt() + eps)
        for mean, square, steps in zip(m, v, t, strict=True)
    ]


def one_minus_power(beta: float, steps: Tensor) -> Tensor | float:
    """1 - beta^t for t >= 1, without the cancellation of a beta near 1 in fp32."""
    return -torch.expm1(steps * math.log(beta)) if beta else 1.0


def decay_and_step(W: list[Tensor], D: Tensors, lr: float, weight_decay: float) -> None:
    """W <- (1 - lr weight_decay) W - lr D, in place."""
    torch._foreach_mul_(W, 1 - lr * weight_decay)
    torch._foreach_sub_(W, torch._foreach_mul(D, lr))


def _fused(
    W: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    t: list[Tensor],
    betas: Betas,
    s: AdamWGroup,
) -> None:
    """All stages in PyTorch's kernel."""
    adamw(
        W,
        g,
        m,
        v,
        max_exp_avg_sqs=[],
        state_steps=t,
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=s.lr,
        weight_decay=s.weight_decay,
        eps=s.eps,
        maximize=False,
    )
