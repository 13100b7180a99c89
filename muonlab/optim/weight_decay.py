"""Weight decay, and by what it is coupled to the learning rate.

One update takes `share` of a weight away, where lr is the group's learning rate at this step:

- `decoupled`: share = lr weight_decay. PyTorch's AdamW, Keller Jordan, Moonlight. Half the lr, half the
  decay.
- `independent`: share = weight_decay lr / peak_lr, peak_lr being the lr that the group was made with. Only
  the schedule acts on it, as in Loshchilov & Hutter, arXiv 1711.05101, algorithm 2; tuning lr leaves it
  alone.
- `shape_scaled`: share = lr scale weight_decay, scale being the factor of the matrix's shape. nanochat,
  muonium.

With `cautious` an entry decays only where the update pulls it the same way, W * update >= 0 (arXiv
2510.12402).
"""

from typing import TypeVar

import torch
from torch import Tensor

WEIGHT_DECAY_KINDS = ("decoupled", "independent", "shape_scaled")

Scalar = TypeVar("Scalar", float, Tensor)  # a tensor where the lr is one, for captured graphs


def decay_share(kind: str, weight_decay: float, lr: Scalar, peak_lr: float, scale: float) -> Scalar:
    """The share of a weight that one update takes away; 0 for weight_decay 0 and for lr 0."""
    if kind == "decoupled":
        return lr * weight_decay
    if kind == "shape_scaled":
        return lr * scale * weight_decay
    return lr * (weight_decay / peak_lr if peak_lr else 0.0)


def decay(params: list[Tensor], updates: list[Tensor], shares: list[Scalar], cautious: bool) -> None:
    """W <- W - share W in place. `updates` are what will be subtracted from the weights after it."""
    if not cautious:
        torch._foreach_mul_(params, [1 - share for share in shares])
        return
    for param, update, share in zip(params, updates, shares, strict=True):
        param.sub_(param * (param * update >= 0) * share)
