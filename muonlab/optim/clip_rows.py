"""From declared attention layouts to one index per weight row, so that a clip is a gather and a product.

All factors of a step are in one vector, the heads of all layers in a row:
`[1 | query rows (heads) | shared-key query rows (heads) | key rows (key heads)]`.
Each declared weight has an index that says which of them its rows are multiplied by; rows that no head owns
(the values of a fused QKV) point at the leading 1 and keep their bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout

MomentumOf = Callable[[nn.Parameter], Tensor | None]


@dataclass(frozen=True, eq=False)
class ClippedWeight:
    """One declared weight or bias; `index` (size along `dim`) points each row at its entry of the factors."""

    parameter: nn.Parameter
    dim: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class HeadBlock:
    """Rows (heads, rows) of one weight; its head h is scaled by entry `first + h` of the factors."""

    weight: ClippedWeight
    rows: Tensor
    first: int


@dataclass(eq=False)
class RowBatch:
    """Weights with `trailing` dimensions behind their heads' one, whose factors are gathered together."""

    trailing: int
    weights: list[nn.Parameter] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def add(self, weight: ClippedWeight) -> None:
        """Append one weight and its index."""
        self.weights.append(weight.parameter)
        self.sizes.append(weight.index.numel())
        self.index = torch.cat([self.index, weight.index])

    def rows(self, factors: Tensor) -> tuple[Tensor, ...]:
        """One factor per row for each weight, shaped to multiply it."""
        return factors[self.index].view(-1, *[1] * self.trailing).split(self.sizes)


class ClipRows:
    """All rows that QK-Clip may scale, and the way from a factor per head to a factor per row.

    `parameters`: every declared weight, once. `sharded`: whether one of them is a DTensor.
    Raises MuonlabError where a row is declared twice, because it would be scaled twice.
    """

    def __init__(self, layouts: Sequence[AttentionLayout]):
        heads = sum(layout.num_heads for layout in layouts)
        self._weights: dict[int, ClippedWeight] = {}
        self._blocks: list[HeadBlock] = []
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
        self.parameters = [weight.parameter for weight in self._weights.values()]
        batches: dict[int, RowBatch] = {}
        for weight in self._weights.values():
            trailing = weight.parameter.ndim - 1 - weight.dim
            batches.setdefault(trailing, RowBatch(trailing)).add(weight)
        self._batches = list(batches.values())
        # A sharded weight (DTensor, FSDP2) knows its mesh; importing DTensor to ask costs half a second.
        self.sharded = any(hasattr(parameter, "device_mesh") for parameter in self.parameters)

    def _declare(self, layer: str, parameter: nn.Parameter, dim: int, rows: Tensor, first: int) -> None:
        dim %= parameter.ndim
        unowned = torch.zeros(parameter.shape[dim], dtype=torch.long)
        weight = self._weights.setdefault(id(parameter), ClippedWeight(parameter, dim, unowned))
        if weight.dim != dim:
            raise MuonlabError(f"{layer}: one weight is declared with heads along dim {weight.dim} and {dim}")
        taken = rows[weight.index[rows] != 0]
        if taken.numel():
            raise MuonlabError(
                f"{layer}: row {taken[0].item()} of a weight {tuple(parameter.shape)} is declared twice and"
                " would be scaled twice; layers that share attention weights need one common layout"
            )
        weight.index[rows] = first + torch.arange(len(rows))[:, None]
        self._blocks.append(HeadBlock(weight, rows, first))

    def promoted(self, dtype: torch.dtype) -> torch.dtype:
        """The least dtype that holds `dtype` and every weight's.

        For factors, from fp32 on: bf16 has steps of 0.4 % just under 1.
        """
        for parameter in self.parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        return dtype

    def to(self, device: torch.device) -> None:
        """Move the indices. Raises MuonlabError if the weights are not all on `device`."""
        for parameter in self.parameters:
            if parameter.device != device:
                raise MuonlabError(
                    f"declared attention weights lie on {device} and {parameter.device}; their factors need"
                    " one device"
                )
        for batch in self._batches:
            batch.index = batch.index.to(device)
        self._blocks = [replace(block, rows=block.rows.to(device)) for block in self._blocks]

    def scale(self, factors: Tensor, momentum_of: MomentumOf | None = None) -> None:
        """Multiply the rows of every weight, and of its momentum if asked for it, by their factors."""
        tensors: list[Tensor] = []
        scales: list[Tensor] = []
        for batch in self._batches:
            rows = batch.rows(factors)
            tensors += batch.weights
            scales += rows
            if momentum_of is not None:
                pairs = [(momentum_of(weight), row) for weight, row in zip(batch.weights, rows, strict=True)]
                tensors += [momentum for momentum, _ in pairs if momentum is not None]
                scales += [row for momentum, row in pairs if momentum is not None]
        if self.sharded:
            _multiply_sharded(tensors, scales)
        else:
            torch._foreach_mul_(tensors, scales)

    def factors_of(self, factors: Tensor) -> dict[Tensor, Tensor]:
        """The factor of every row of each weight, shaped to multiply it."""
        return {
            weight: rows
            for batch in self._batches
            for weight, rows in zip(batch.weights, batch.rows(factors), strict=True)
        }

    def norms(self, entries: int) -> Tensor:
        """(entries,): the Frobenius norm of all rows of each entry of the factors, in fp32 at least; 0 for none.

        Not for sharded weights.
        """
        first = self.parameters[0]
        squares = torch.zeros(entries, dtype=self.promoted(torch.float32), device=first.device)
        for block in self._blocks:
            weight, dim, heads = block.weight.parameter, block.weight.dim, len(block.rows)
            rows = weight.index_select(dim, block.rows.flatten()).movedim(dim, 0)
            squares[block.first : block.first + heads] += rows.reshape(heads, -1).to(squares).square().sum(1)
        return squares.sqrt()

    def project(self, factors: Tensor, momentum_of: MomentumOf) -> None:
        """Take from a clipped head's momentum M its part along its weights W: M - (<M, W> / <W, W>) W.

        Not for sharded weights.
        """
        for block in self._blocks:
            weight, dim = block.weight.parameter, block.weight.dim
            momentum = momentum_of(weight)
            if momentum is None:
                continue
            heads, rows = len(block.rows), block.rows.flatten()
            head_rows = momentum.index_select(dim, rows).movedim(dim, 0)
            M = head_rows.reshape(heads, -1).to(factors.dtype)
            W = weight.index_select(dim, rows).movedim(dim, 0).reshape(heads, -1).to(factors.dtype)
            norm = (W * W).sum(1)
            radial = torch.where(norm > 0, (M * W).sum(1) / norm, 0.0)
            clipped = factors[block.first : block.first + heads] < 1
            M = torch.where(clipped[:, None], M - radial[:, None] * W, M)
            momentum.index_copy_(dim, rows, M.reshape(head_rows.shape).to(momentum.dtype).movedim(0, dim))


def _multiply_sharded(tensors: list[Tensor], scales: list[Tensor]) -> None:
    """Every rank holds all factors; DTensor multiplies its own rows by its own share of them."""
    from torch.distributed.tensor import DTensor, Replicate

    for tensor, scale in zip(tensors, scales, strict=True):
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is not None:
            scale = DTensor.from_local(scale, mesh, [Replicate()] * mesh.ndim, run_check=False)
        tensor.mul_(scale)


class HeadGroups(NamedTuple):
    """Consecutive heads in groups: `members` (groups, widest), padded by the last one; the `owner` of each head."""

    members: Tensor
    owner: Tensor

    def to(self, device: torch.device) -> "HeadGroups":
        return HeadGroups(self.members.to(device), self.owner.to(device))


def head_groups(sizes: list[int]) -> HeadGroups:
    """Groups of these sizes, one after the other."""
    first, size = torch.tensor([0, *sizes[:-1]]).cumsum(0), torch.tensor(sizes)
    members = first[:, None] + torch.minimum(torch.arange(max(sizes)), size[:, None] - 1)
    return HeadGroups(members, torch.arange(len(sizes)).repeat_interleave(size))
