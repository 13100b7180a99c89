"""Rules that update every entry by itself: Lion, Signum, AdEMAMix and NAdamW, each with its source and equations.

With g the gradient, t the number of steps with this one and λ the weight decay, all of them end with

    W <- (1 - lr λ) W - lr D

and differ in the direction D. Every rank updates the entries that it holds, however they are spread.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from muonlab.optim.adamw_rule import averages, decay_and_step, one_minus_power
from muonlab.optim.combined import CombinedOptimizer
from muonlab.optim.qk_clip import QKClip
from muonlab.optim.rules import Batch, Rule, register_rule
from muonlab.optim.whole_model import optimizer_of_its_name
from muonlab.settings.check import Average, Count, NonNegative


# ---------------------------------------------------------------- Lion
@dataclass(frozen=True, kw_only=True)
class LionGroup:
    """The settings of one group; `Lion` explains them."""

    lr: NonNegative = 1e-4
    betas: tuple[Average, Average] = (0.9, 0.99)
    weight_decay: NonNegative = 0.0


@optimizer_of_its_name
@register_rule("lion")
class LionRule(Rule):
    """Lion (Chen et al., arXiv 2302.06675, algorithm 2)."""

    settings = LionGroup
    buffers = ("momentum_buffer",)

    def update(self, batch: Batch) -> None:
        """D = sign(b1 m + (1 - b1) g), with m of the steps before; then m <- b2 m + (1 - b2) g."""
        s, g, m, betas = batch.settings(LionGroup), batch.grads, batch.buffers("momentum_buffer"), batch.betas
        D = torch._foreach_lerp(m, g, 1 - betas[0])
        torch._foreach_sign_(D)
        torch._foreach_lerp_(m, g, 1 - betas[1])
        decay_and_step(batch.params, D, s.lr, s.weight_decay)


class Lion(CombinedOptimizer):
    """Lion (arXiv 2302.06675): every entry moves by lr, in the direction that two averages agree on.

    lr: what every entry moves by per step; 0 changes nothing. Sane: a third to a tenth of AdamW's.
    betas: weights of the past in the direction and in what is kept, each in [0, 1).
    weight_decay: the share of a weight lost per step is lr * weight_decay; 0: none. Sane: 3 to 10 times AdamW's.
    clip: a `QKClip` that acts after every update, or None.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        clip: QKClip | None = None,
    ):
        group = LionGroup(lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__(params, "lion", {"lion": group}, clip)


# ---------------------------------------------------------------- Signum
@dataclass(frozen=True, kw_only=True)
class SignumGroup:
    """The settings of one group; `Signum` explains them."""

    lr: NonNegative = 0.01
    momentum: Average = 0.9
    weight_decay: NonNegative = 0.0


@optimizer_of_its_name
@register_rule("signum")
class SignumRule(Rule):
    """Signum (Bernstein et al., arXiv 1802.04434, algorithm 2, on one worker)."""

    settings = SignumGroup
    buffers = ("momentum_buffer",)

    def update(self, batch: Batch) -> None:
        """m <- mu m + (1 - mu) g; D = sign(m)."""
        s, m = batch.settings(SignumGroup), batch.buffers("momentum_buffer")
        torch._foreach_lerp_(m, batch.grads, 1 - s.momentum)
        decay_and_step(batch.params, torch._foreach_sign(m), s.lr, s.weight_decay)


class Signum(CombinedOptimizer):
    """Signum (arXiv 1802.04434): every entry moves by lr against the sign of its average gradient.

    The defaults are those of Signum in MXNet.

    lr: what every entry moves by per step; 0 changes nothing. Sane: 1e-4 to 1e-2.
    momentum: weight of the past, in [0, 1); 0 is signSGD.
    weight_decay: the share of a weight lost per step is lr * weight_decay; 0: none.
    clip: a `QKClip` that acts after every update, or None.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clip: QKClip | None = None,
    ):
        group = SignumGroup(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, "signum", {"signum": group}, clip)


# ---------------------------------------------------------------- AdEMAMix
@dataclass(frozen=True, kw_only=True)
class AdEMAMixGroup:
    """The settings of one group; `AdEMAMix` explains them."""

    lr: NonNegative = 1e-3
    betas: tuple[Average, Average, Average] = (0.9, 0.999, 0.9999)
    alpha: NonNegative = 2.0
    alpha_warmup: Count | None = None
    beta3_warmup: Count | None = None
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0


@optimizer_of_its_name
@register_rule("ademamix")
class AdEMAMixRule(Rule):
    """AdEMAMix (Pagliardini et al., arXiv 2409.03137, algorithm 1)."""

    settings = AdEMAMixGroup
    buffers = ("exp_avg", "exp_avg_sq", "exp_avg_slow")
    numbers: ClassVar = {"step": 0.0}

    def update(self, batch: Batch) -> None:
        """m1, m2 <- averages of g with b1 and b3(t), v <- that of g² with b2;
        D = (m1 / (1 - b1^t) + alpha(t) m2) / (sqrt(v / (1 - b2^t)) + eps)."""
        s, g, betas = batch.settings(AdEMAMixGroup), batch.grads, batch.betas
        m1, v, m2 = (batch.buffers(name) for name in self.buffers)
        t = batch.buffers("step")
        averages(g, m1, v, t, betas)
        D = []
        for gradient, fast, square, slow, count in zip(g, m1, v, m2, t, strict=True):
            steps = count.to(fast.dtype)
            slow.lerp_(gradient, 1 - slow_beta(steps, betas[0], betas[2], s.beta3_warmup))
            alpha = s.alpha if s.alpha_warmup is None else s.alpha * (steps / s.alpha_warmup).clamp(max=1)
            root = (square / one_minus_power(betas[1], steps)).sqrt()
            D.append((fast / one_minus_power(betas[0], steps) + alpha * slow) / (root + s.eps))
        decay_and_step(batch.params, D, s.lr, s.weight_decay)


def slow_beta(t: Tensor, start: float, end: float, warmup: int | None) -> Tensor:
    """b3(t): from `start` to `end` so that the half-life of the slow average grows linearly over `warmup` steps.

    exp(ln b1 ln b3 / ((1 - t/T) ln b3 + t/T ln b1)), arXiv 2409.03137, section 3.1.
    """
    if warmup is None or not end:
        return torch.full_like(t, end)
    share = (t / warmup).clamp(max=1)
    ratio = math.log(end) / math.log(start) if start else 0.0
    return (math.log(end) / ((1 - share) * ratio + share)).exp()


class AdEMAMix(CombinedOptimizer):
    """AdamW with a second, much slower average of the gradient (arXiv 2409.03137).

    lr: RMS of an entry's change per step, early on, over 1 + alpha; 0 changes nothing. Sane: AdamW's.
    betas: weights of the past in the fast average, the average of squares and the slow average, each in [0, 1).
    alpha: weight of the slow average beside the fast one; 0 is AdamW. Sane: 2 to 10.
    alpha_warmup, beta3_warmup: steps over which alpha grows from 0 and the slow average's beta from the fast one's;
        None: none. The paper takes the whole run, because the slow average is unstable without.
    eps: added to the root of the squares, in units of the gradient.
    weight_decay: the share of a weight lost per step is lr * weight_decay; 0: none.
    clip: a `QKClip` that acts after every update, or None.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: QKClip | None = None,
    ):
        group = AdEMAMixGroup(
            lr=lr,
            betas=betas,
            alpha=alpha,
            alpha_warmup=alpha_warmup,
            beta3_warmup=beta3_warmup,
            eps=eps,
            weight_decay=weight_decay,
        )
        super().__init__(params, "ademamix", {"ademamix": group}, clip)


# ---------------------------------------------------------------- NAdamW
@dataclass(frozen=True, kw_only=True)
class NAdamWGroup:
    """The settings of one group; `NAdamW` explains them."""

    lr: NonNegative = 2e-3
    betas: tuple[Average, Average] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    momentum_decay: NonNegative = 4e-3
    weight_decay: NonNegative = 0.0


@optimizer_of_its_name
@register_rule("nadamw")
class NAdamWRule(Rule):
    """NAdam (Dozat, 2016) with decoupled weight decay, as in torch.optim.NAdam(decoupled_weight_decay=True)."""

    settings = NAdamWGroup
    buffers = ("exp_avg", "exp_avg_sq")
    numbers: ClassVar = {"step": 0.0, "mu_product": 1.0}

    def update(self, batch: Batch) -> None:
        """mu(t) = b1 (1 - 0.96^(t psi) / 2), P <- P mu(t), m and v as Adam's;
        D = ((1 - mu(t)) / (1 - P) g + mu(t + 1) / (1 - P mu(t + 1)) m) / (sqrt(v / (1 - b2^t)) + eps)."""
        s, g, betas = batch.settings(NAdamWGroup), batch.grads, batch.betas
        m, v, t, product = (batch.buffers(name) for name in (*self.buffers, *self.numbers))
        averages(g, m, v, t, betas)
        D = []
        for gradient, mean, square, count, P in zip(g, m, v, t, product, strict=True):
            steps = count.to(mean.dtype)
            now, following = (
                betas[0] * (1 - 0.5 * 0.96 ** (at * s.momentum_decay)) for at in (steps, steps + 1)
            )
            P.mul_(now)
            past = P.to(mean.dtype)
            ahead = gradient * ((1 - now) / (1 - past)) + mean * (following / (1 - past * following))
            D.append(ahead / ((square / one_minus_power(betas[1], steps)).sqrt() + s.eps))
        decay_and_step(batch.params, D, s.lr, s.weight_decay)


class NAdamW(CombinedOptimizer):
    """AdamW with Nesterov's look-ahead: torch.optim.NAdam with decoupled weight decay (Dozat, 2016).

    lr: RMS of an entry's change per step, early on; 0 changes nothing. Sane: AdamW's.
    betas: weights of the past in the averages of the gradient and of its square, each in [0, 1); the first is
        halved at the start and grows to the whole.
    eps: added to the root of the squares, in units of the gradient.
    momentum_decay: psi, how fast the first beta grows; 0 leaves it at a half. Sane: 4e-3.
    weight_decay: the share of a weight lost per step is lr * weight_decay; 0: none.
    clip: a `QKClip` that acts after every update, or None.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum_decay: float = 4e-3,
        weight_decay: float = 0.0,
        clip: QKClip | None = None,
    ):
        group = NAdamWGroup(
            lr=lr, betas=betas, eps=eps, momentum_decay=momentum_decay, weight_decay=weight_decay
        )
        super().__init__(params, "nadamw", {"nadamw": group}, clip)
