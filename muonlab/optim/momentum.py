"""The direction that is orthogonalised: a running average of gradients, with or without Nesterov's look-ahead.

With g the gradient, m the buffer and mu the momentum of this step:

- `ema`: m <- mu m + (1 - mu) g; Nesterov (1 - mu) g + mu m. PyTorch, Keller Jordan, Emerging-Optimizers.
- `heavy_ball`: m <- mu m + g; Nesterov g + mu m. Moonlight, dion, gram-newton-schulz.
- `ema_corrected`: `ema` with Adam's bias corrections, and NAdam's under Nesterov (Dozat 2016, algorithm 2):
  (1 - mu) g / (1 - P_t) + mu m / (1 - P_t mu), P_t the product of all mu so far. optax.

With a constant mu and a zero start `ema` and `heavy_ball` give the same direction up to the factor 1 - mu, which
orthogonalisation removes. Under a momentum schedule they do not: the buffer of `heavy_ball` keeps the weights 1
that old gradients came in with, `ema` the weights 1 - mu of their own steps.
"""

from typing import Any

import torch
from torch import Tensor

MOMENTUM_KINDS = ("ema", "heavy_ball", "ema_corrected")


def momentum_directions(
    grads: list[Tensor], states: list[dict[str, Any]], kind: str, momentum: float, nesterov: bool
) -> list[Tensor]:
    """Advance every `momentum_buffer` and return the directions, tensors of the gradients' shapes.

    Never writes to a gradient. Without Nesterov the directions may be the buffers themselves: read only.
    """
    buffers = [state["momentum_buffer"] for state in states]
    if kind == "heavy_ball":
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        return torch._foreach_add(grads, torch._foreach_mul(buffers, momentum)) if nesterov else buffers
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    if not nesterov:
        return buffers
    if kind == "ema":
        return torch._foreach_lerp(grads, buffers, momentum)
    directions = []
    for grad, buffer, state in zip(grads, buffers, states, strict=True):
        product = state["momentum_product"] = state.get("momentum_product", 1.0) * momentum
        directions.append(
            grad * ((1 - momentum) / (1 - product)) + buffer * (momentum / (1 - product * momentum))
        )
    return directions
