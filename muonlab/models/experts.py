"""Routed experts as stacks of matrices, and the products of grouped rows with them: no token is ever dropped.

Shape legend: N tokens, D width, E experts, k experts per token, M = N k assignments, h hidden units of an expert.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.layout import ParameterRole
from muonlab.models.mlp import swiglu

# What torch's grouped product takes on a device; it reads rows of whole 16 bytes.
GROUPED_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}
ALIGNMENT = 16


class Grouping(NamedTuple):
    """Assignments sorted by expert.

    order (M,): the assignment, numbered row by row of (N, k), at each sorted place.
    inverse (M,): the place of each assignment.
    ends (E,) int32: where each expert's places end.
    """

    order: Tensor
    inverse: Tensor
    ends: Tensor

    @property
    def loads(self) -> Tensor:
        """Tokens of each expert, (E,) int64; they sum to M."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).long()


def group_by_expert(choices: Tensor, num_experts: int) -> Grouping:
    """Sort the choices (N, k) by expert, first tokens first, without a wait for the device."""
    experts, order = choices.flatten().sort(stable=True)
    places = torch.arange(len(order), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, places)
    numbers = torch.arange(num_experts, device=order.device)
    return Grouping(order, inverse, torch.searchsorted(experts, numbers, right=True).int())


class _Dispatch(torch.autograd.Function):
    """Row of x of every sorted assignment: (N, D) -> (M, D). The backward gathers too, where autograd scatters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """sum_k g_nk y_(place of nk): sorted outputs (M, D) and gates (N, k) -> (N, D), gathering both ways."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gates: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y, gates, order, inverse)
        rows = y.index_select(0, inverse).unflatten(0, gates.shape)
        return (rows * gates.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, gates, order, inverse = ctx.saved_tensors
        rows = grad.index_select(0, order // gates.shape[1])
        grad_gates = (y * rows).sum(-1).index_select(0, inverse).view_as(gates)
        return rows * gates.flatten().index_select(0, order).unsqueeze(-1), grad_gates, None, None


def padded_products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_products` in every dtype: one batched product, experts padded with zeros to the fullest one's load."""
    starts = ends - ends.diff(prepend=ends.new_zeros(1))
    places = torch.arange(len(x), device=x.device)
    expert = torch.searchsorted(ends, places, right=True)
    most = int((ends - starts).max())
    slot = expert * most + places - starts[expert]
    padded = x.new_zeros(len(ends) * most, x.shape[1]).index_copy(0, slot, x)
    return (padded.view(len(ends), most, -1) @ weight.mT).flatten(0, 1).index_select(0, slot)


# A custom operator, because torch's version compiles only in bf16.
@torch.library.custom_op("muonlab::grouped_mm", mutates_args=())
def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """(M, in) x (E, in, out) -> (M, out), or (in, M) x (M, out) -> (E, in, out), in groups along M."""
    return F.grouped_mm(a, b, offs=ends)


@_grouped_mm.register_fake
def _shape(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    shape = (a.shape[0], b.shape[2]) if b.ndim == 3 else (ends.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(shape)


def _save_factors(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    a, b, ends = ctx.saved_tensors
    return _grouped_mm(grad, b.mT, ends), _grouped_mm(a.mT, grad, ends), None


_grouped_mm.register_autograd(_gradients, setup_context=_save_factors)


def grouped_products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """W_e x_m for the rows of each expert e: x (M, in) grouped, weight (E, out, in), ends (E,) -> (M, out)."""
    aligned = all(size * x.element_size() % ALIGNMENT == 0 for size in weight.shape[1:])
    if aligned and x.dtype in GROUPED_DTYPES.get(x.device.type, ()):
        return _grouped_mm(x, weight.mT, ends)
    return padded_products(x, weight, ends)


class Experts(nn.Module):
    """E experts down_e(swiglu(gate_e x, up_e x)) as three stacks (E, rows, cols); `clamp` as in `swiglu`."""

    def __init__(self, num_experts: int, d_model: int, hidden: int, clamp: float = 0.0):
        super().__init__()
        self.clamp = clamp
        self.gate = nn.Parameter(torch.empty(num_experts, hidden, d_model))
        self.up = nn.Parameter(torch.empty(num_experts, hidden, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, hidden))
        for stack in self.parameters():
            nn.init.normal_(stack, std=stack.shape[-1] ** -0.5)

    def forward(self, x: Tensor, gates: Tensor, groups: Grouping) -> Tensor:
        """sum over a token's experts of gate * expert(x): x (N, D), gates (N, k) -> (N, D)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = _Dispatch.apply(x, groups.order, groups.inverse, gates.shape[1])
        gate, up = (grouped_products(rows, w.to(x.dtype), groups.ends) for w in (self.gate, self.up))
        out = grouped_products(swiglu(gate, up, self.clamp), self.down.to(x.dtype), groups.ends)
        return _Combine.apply(out, gates.to(out.dtype), groups.order, groups.inverse)

    def roles(self) -> dict[str, ParameterRole]:
        """The role of each parameter by its name within this module."""
        return {name: ParameterRole("expert") for name, _ in self.named_parameters()}
