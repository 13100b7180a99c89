"""Weight decay, and by what it is coupled to the learning rate.

One update takes away share * W, where lr is the group's learning rate of this step:

- `decoupled`: share = lr * weight_decay. PyTorch's AdamW, Keller Jordan, Moonlight. Halving lr halves the decay.
- `independent`: share = weight_decay * lr / peak_lr. The schedule's multiplier alone, as in Loshchilov & Hutter
  (arXiv 1711.05101, algorithm 2); peak_lr is the lr that the group was made with. Tuning lr leaves the decay.
- `shape_scaled`: share = lr * scale * weight_decay, scale the factor of the scale rule for the matrix's shape.
  nanochat, muonium.

With `cautious` an entry decays only where the update moves it the same way, W * update >= 0 (arXiv 2510.12402).
"""

import torch
from torch import Tensor

WEIGHT_DECAY_KINDS = ("decoupled", "independent", "shape_scaled")


def decay_share(
    kind: str, weight_decay: float, lr: float | Tensor, peak_lr: float, scale: float
) -> float | Tensor:
    """The share of a weight that one update takes away; 0 for weight_decay 0 and for lr 0."""
    if kind == "decoupled":
        return lr * weight_decay
    if kind == "shape_scaled":
        return lr * scale * weight_decay
    return weight_decay * (lr / peak_lr) if peak_lr else 0.0


def decay(
    params: list[Tensor], directions: list[Tensor], shares: list[float] | list[Tensor], cautious: bool
) -> None:
    """W <- W - share * W in place, before the update itself; `directions` are what the update will subtract."""
    if not cautious:
        torch._foreach_mul_(params, [1 - share for share in shares])
        return
    for param, direction, share in zip(params, directions, shares, strict=True):
        param.sub_(param * (param * direction >= 0) * share)
