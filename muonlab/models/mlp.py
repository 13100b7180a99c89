"""The feed-forward half of a block: GELU, ReLU^2 or SwiGLU."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.layout import ParameterRole


class _Relu2(torch.autograd.Function):
    """Autograd's backward of relu(x)^2 makes five passes over the widest tensor of the model; this one makes two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return (grad * r).mul_(2)  # d max(x, 0)^2 / dx = 2 max(x, 0)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, arXiv 2109.08668)."""
    return _Relu2.apply(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu2": relu2, "swiglu": F.silu}


class MLP(nn.Module):
    """x (..., D) -> (..., D) through `hidden` units.

    `swiglu` multiplies silu(gate(x)) into up(x) (arXiv 2002.05202) and so has a third matrix.
    """

    def __init__(self, d_model: int, hidden: int, activation: str = "relu2", bias: bool = False):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(d_model, hidden, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(d_model, hidden, bias=bias)
        self.down = nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        up = self.up(x)
        hidden = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        return self.down(hidden)

    def roles(self) -> dict[str, ParameterRole]:
        """The role of each parameter by its name within this module."""
        return {n: ParameterRole("bias" if n.endswith("bias") else "mlp") for n, _ in self.named_parameters()}
