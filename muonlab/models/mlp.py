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


def swiglu(gate: Tensor, up: Tensor, clamp: float = 0.0) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202).

    `clamp` c > 0 makes it silu(min(gate, c)) * min(max(up, -c), c), of magnitude c max(c, 0.28) at most (the clamp of
    GPT-OSS, by its reference code; DeepSeek-V4's, section 4.2.3); 0: none.
    """
    if clamp:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu2": relu2}


class MLP(nn.Module):
    """x (..., D) -> (..., D) through `hidden` units.

    activation: "gelu", "relu2" or "swiglu", which has a third matrix, and `clamp` is its.
    """

    def __init__(
        self, d_model: int, hidden: int, activation: str = "relu2", bias: bool = False, clamp: float = 0.0
    ):
        super().__init__()
        self.activation, self.clamp = activation, clamp
        self.gate = nn.Linear(d_model, hidden, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(d_model, hidden, bias=bias)
        self.down = nn.Linear(hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        up = self.up(x)
        if self.gate is not None:
            return self.down(swiglu(self.gate(x), up, self.clamp))
        return self.down(ACTIVATIONS[self.activation](up))

    def roles(self) -> dict[str, ParameterRole]:
        """The role of each parameter by its name within this module."""
        return {n: ParameterRole("bias" if n.endswith("bias") else "mlp") for n, _ in self.named_parameters()}
