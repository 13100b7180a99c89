"""From declared attention layouts to one index per weight row, so that a clip is one gather and one multiply.

All factors of a step stand in one vector, `[1 | query rows (heads) | shared-key query rows (heads) | key rows
(key heads)]`, heads of all layers in a row. An index vector per declared weight says by which entry each of its
rows is multiplied; rows that no head owns (the values of a fused QKV) point at the leading 1 and keep their bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout

MomentumOf = Callable[[nn.Parameter], Tensor | None]


@dataclass(eq=False)
class ScaledWeight:
    """One declared weight or bias; `index` (size along `dim`) points each row at its entry of the factors."""

    parameter: nn.Parameter
    dim: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class HeadBlock:
    """Rows (heads, rows) of one weight; head h of the block is scaled by entry `first + h` of the factors."""

    weight: ScaledWeight
    rows: Tensor
    first: int


class ClipRows:
    """All rows that QK-Clip may scale, and the way from a factor per head to a factor per row.

    Raises MuonlabError where a row is declared twice, because it would be scaled twice.
    """

    def __init__(self, layouts: Sequence[AttentionLayout]):
        heads = sum(layout.num_heads for layout in layouts)
        self.weights: dict[int, ScaledWeight] = {}
        self.blocks: list[HeadBlock] = []
        query, key = 1, 1 + 2 * heads
        for layout in layouts:
            for declared, first, count in (
                (layout.query, query, layout.num_heads),
                (layout.query_shared_key, query + heads, layout.num_heads),
                (layout.key, key, layout.num_kv_heads),
            ):
                for block in declared:
                    self._declare(layout.name, block.parameter, block.dim, block.row_indices(count), first)
            query, key = query + layout.num_heads, key + layout.num_kv_heads
        self._targets = list(self.weights.values())
        self._sizes = [weight.index.numel() for weight in self._targets]
        self._index = torch.cat([weight.index for weight in self._targets])

    def _declare(self, layer: str, parameter: nn.Parameter, dim: int, rows: Tensor, first: int) -> None:
        dim %= parameter.ndim
        unowned = torch.zeros(parameter.shape[dim], dtype=torch.long)
        weight = self.weights.setdefault(id(parameter), ScaledWeight(parameter, dim, unowned))
        if weight.dim != dim:
            raise MuonlabError(
                f"{layer}: one weight is declared with heads along dim {weight.dim} and dim {dim}"
            )
        taken = rows[weight.index[rows] != 0]
        if taken.numel():
            raise MuonlabError(
                f"{layer}: row {taken[0].item()} of a weight {tuple(parameter.shape)} is declared twice and would be"
                " scaled twice; layers that share attention weights need one common layout"
            )
        weight.index[rows] = first + torch.arange(len(rows))[:, None]
        self.blocks.append(HeadBlock(weight, rows, first))

    @property
    def device(self) -> torch.device:
        """Where the weights are now. Raises MuonlabError if they are not all in one place."""
        devices = {weight.parameter.device for weight in self._targets}
        if len(devices) > 1:
            names = " and ".join(sorted(map(str, devices)))
            raise MuonlabError(
                f"the declared attention weights lie on {names}; QK-Clip needs them on one device"
            )
        return devices.pop()

    def scale(self, factors: Tensor, momentum_of: MomentumOf | None = None) -> None:
        """Multiply every row of every weight, and of its momentum where `momentum_of` gives one, by its factor."""
        if self._index.device != factors.device:
            self._index = self._index.to(factors.device)
        tensors, scales = [], []
        for weight, rows in zip(self._targets, factors[self._index].split(self._sizes), strict=True):
            momentum = None if momentum_of is None else momentum_of(weight.parameter)
            for tensor in (weight.parameter, momentum):
                if tensor is not None:
                    tensors.append(tensor)
                    scales.append(_along(rows, weight.dim, tensor))
        torch._foreach_mul_(tensors, scales)

    def project(self, factors: Tensor, momentum_of: MomentumOf) -> None:
        """Take from the momentum M of every clipped head its part along the head's weights W: M - (<M,W>/<W,W>) W."""
        for block in self.blocks:
            weight, dim = block.weight.parameter, block.weight.dim
            momentum = momentum_of(weight)
            if momentum is None:
                continue
            if isinstance(momentum, DTensor):
                raise MuonlabError("momentum='project' needs whole weights, not sharded ones (DTensor)")
            rows = block.rows.to(weight.device).flatten()
            heads = len(block.rows)
            w = weight.index_select(dim, rows).movedim(dim, 0)
            m = momentum.index_select(dim, rows).movedim(dim, 0)
            flat_w, flat_m = (part.reshape(heads, -1).to(factors.dtype) for part in (w, m))
            radial = (flat_m * flat_w).sum(1) / (flat_w * flat_w).sum(1)
            clipped = factors[block.first : block.first + heads] < 1
            flat_m = torch.where(clipped[:, None], flat_m - radial[:, None] * flat_w, flat_m)
            momentum.index_copy_(dim, rows, flat_m.reshape(m.shape).to(m.dtype).movedim(0, dim))


def _along(rows: Tensor, dim: int, tensor: Tensor) -> Tensor:
    """`rows` shaped to multiply `tensor` along `dim`; for a sharded tensor, its own share of them."""
    rows = rows.view([-1 if d == dim else 1 for d in range(tensor.ndim)])
    if isinstance(tensor, DTensor):
        return DTensor.from_local(
            rows, tensor.device_mesh, [Replicate()] * tensor.device_mesh.ndim, run_check=False
        )
    return rows
