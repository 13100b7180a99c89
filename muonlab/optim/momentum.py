"""The direction that is orthogonalised: an average of past gradients, with or without Nesterov's look-ahead.

With g the gradient, m the buffer and mu the momentum of this step:

- `ema`: m <- mu m + (1 - mu) g; Nesterov: (1 - mu) g + mu m. PyTorch, Keller Jordan, Emerging-Optimizers.
- `heavy_ball`: m <- mu m + g; Nesterov: g + mu m. Moonlight, dion, gram-newton-schulz.
- `ema_corrected`: `ema` with Adam's bias correction, and NAdam's under Nesterov (Dozat 2016, algorithm 2):
  (1 - mu) g / (1 - P) + mu m / (1 - P mu), P being the product of all mu so far. optax.

From a zero start and with a constant mu, `heavy_ball` is `ema` times 1/(1 - mu), a factor which
orthogonalisation removes. Under a momentum schedule they differ: `ema` weighs each gradient by the 1 - mu of
its own step, `heavy_ball` weighs all alike. mu is read anew at every step, so either is right under a
schedule.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from muonlab.optim.checks import plain_value
from muonlab.optim.sharded import local_part

MOMENTUM_KINDS = ("ema", "heavy_ball", "ema_corrected")


def momentum_directions(
    grads: list[Tensor], states: list[dict[str, Any]], kind: str, momentum: float, nesterov: bool
) -> Sequence[Tensor]:
    """Advance every state's `momentum_buffer` and return the directions, in the gradients' shapes.

    The gradients of sharded parameters are those of the rows that are here. Never writes to a gradient. Without
    Nesterov the directions are the buffers themselves: read only.
    """
    buffers = [local_part(state["momentum_buffer"]) for state in states]
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
        product = state["momentum_product"] = plain_value(state.get("momentum_product", 1.0) * momentum)
        ahead, past = (1 - momentum) / (1 - product), momentum / (1 - product * momentum)
        directions.append(grad * ahead + buffer * past)
    return directions
