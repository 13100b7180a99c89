"""How a parameter is seen as matrices (out, in): whole, a stack, blocks of heads, a flattened filter."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.settings.check import Count

# torch's own dicts, of a parameter group and of what is kept for one parameter: values of every kind by name.
Group = dict[str, Any]
State = dict[str, Any]
Kept = dict[str, Tensor]  # what stages keep of one stack of matrices from step to step, to be written to


@dataclass(frozen=True, kw_only=True)
class MatrixSettings:
    """Settings of a rule for matrices, explained at `MatrixView`.

    A rule whose `settings` derive from it takes nothing but matrices, and is routed the hidden ones of a model.
    """

    row_blocks: Count | Sequence[Count] = 1
    col_blocks: Count = 1
    flatten: bool = False


@dataclass(frozen=True)
class MatrixView:
    """The matrices of one parameter that are orthogonalised separately.

    A parameter (rows, cols) is one matrix, (E, rows, cols) a stack of E, such as experts.

    row_blocks: n cuts the rows into n equal blocks (the heads of a query, key or value weight); a tuple of
        sizes cuts unequal ones (a fused QKV weight with fewer key heads). 1: whole.
    col_blocks: n cuts the columns into n equal blocks (the heads of an attention output weight). 1: whole.
    flatten: see (out, in, *kernel) as one matrix (out, in * prod(kernel)). Without it a filter is refused,
        because its last two dimensions do not form a matrix.
    """

    row_blocks: int | tuple[int, ...] = 1
    col_blocks: int = 1
    flatten: bool = False

    def __post_init__(self) -> None:
        counts = self.row_blocks if isinstance(self.row_blocks, tuple) else (self.row_blocks,)
        for count in (*counts, self.col_blocks):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise MuonlabError(
                    "row_blocks must be a number of equal blocks or a list of block sizes and col_blocks a "
                    f"number of blocks, all at least 1, not {self.row_blocks!r} and {self.col_blocks!r}"
                )
        if self.col_blocks > 1 and self.row_blocks != 1:
            raise MuonlabError(
                "a matrix is cut along its rows (row_blocks) or its columns (col_blocks), not both"
            )

    @classmethod
    def of(cls, group: Group) -> "MatrixView":
        """How the parameters of this group are seen."""
        return cls(group["row_blocks"], group["col_blocks"], group["flatten"])

    def check(self, shape: torch.Size, name: str) -> None:
        """Raise MuonlabError if a parameter of this shape has no such view."""
        parameter = f"{name} of shape {tuple(shape)}"
        if len(shape) < 2 or 0 in shape:
            raise MuonlabError(
                f"a rule for matrices cannot update {parameter}, which is not a matrix; use a group with rule='adamw'"
            )
        if len(shape) > 3 and not self.flatten:
            raise MuonlabError(
                f"a rule for matrices cannot update {parameter}, which is a filter and not a matrix; set flatten=True"
                " to see it as (out, in * kernel), or use a group with rule='adamw'"
            )
        rows, cols = (shape[0], math.prod(shape[1:])) if self.flatten else shape[-2:]
        if isinstance(self.row_blocks, tuple):
            if sum(self.row_blocks) != rows:
                raise MuonlabError(
                    f"{parameter}: row_blocks add up to {sum(self.row_blocks)}, not to {rows} rows"
                )
        elif rows % self.row_blocks:
            raise MuonlabError(f"{parameter}: {rows} rows cannot be cut into {self.row_blocks} equal blocks")
        if cols % self.col_blocks:
            raise MuonlabError(
                f"{parameter}: {cols} columns cannot be cut into {self.col_blocks} equal blocks"
            )

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Stacks (..., rows, cols) of the matrices, without a copy where the strides of `tensor` allow."""
        matrix = tensor.flatten(1) if self.flatten else tensor
        if isinstance(self.row_blocks, tuple):
            return list(matrix.split(self.row_blocks, dim=-2))
        if self.row_blocks > 1:
            return [matrix.unflatten(-2, (self.row_blocks, -1))]
        if self.col_blocks > 1:
            return [matrix.unflatten(-1, (self.col_blocks, -1)).transpose(-2, -3)]
        return [matrix]

    def join(self, blocks: list[Tensor], shape: torch.Size) -> Tensor:
        """The inverse of `split`: a tensor of the parameter's shape."""
        if isinstance(self.row_blocks, tuple):
            return torch.cat(blocks, dim=-2).reshape(shape)
        block = blocks[0].transpose(-2, -3) if self.col_blocks > 1 else blocks[0]
        return block if block.shape == shape else block.reshape(shape)

    def block_shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """The shapes of what `split` returns for a parameter of this shape."""
        *stack, rows, cols = (shape[0], math.prod(shape[1:])) if self.flatten else shape
        if isinstance(self.row_blocks, tuple):
            return [(*stack, size, cols) for size in self.row_blocks]
        if self.row_blocks > 1:
            return [(*stack, self.row_blocks, rows // self.row_blocks, cols)]
        if self.col_blocks > 1:
            return [(*stack, self.col_blocks, rows, cols // self.col_blocks)]
        return [(*stack, rows, cols)]

    def describe(self, shape: torch.Size) -> str:
        """The view in words for the routing table: "64 x 64", "8 of 32 x 64", "512 x 512 + 128 x 512"."""
        words = []
        for *stack, rows, cols in self.block_shapes(shape):
            count = math.prod(stack)
            words.append(f"{rows} x {cols}" if count == 1 else f"{count} of {rows} x {cols}")
        return " + ".join(words)


@dataclass(frozen=True)
class Matrices:
    """Whole matrices that are to be transformed, as stacks (..., rows, cols).

    stacks: views, where strides allow, of the tensors that they were split from.
    kept: of each stack, the entries that stages keep of it from step to step, to be written to.
    join: from the transformed stacks, in their order, to one tensor per parameter, of the shape that it was split from.
    """

    stacks: list[Tensor]
    kept: list[Kept]
    join: Callable[[Sequence[Tensor]], list[Tensor]]


def matrices(
    tensors: Sequence[Tensor], views: Sequence[MatrixView], states: Sequence[State], entries: Sequence[str]
) -> Matrices:
    """The matrices of whole tensors, one tensor, one view and one state per parameter, with these entries of each."""
    blocks = [view.split(tensor) for view, tensor in zip(views, tensors, strict=True)]
    kept = [
        {entry: state[entry_name(entry, j)] for entry in entries}
        for state, own in zip(states, blocks, strict=True)
        for j in range(len(own))
    ]

    def join(transformed: Sequence[Tensor]) -> list[Tensor]:
        rest = iter(transformed)
        return [
            view.join([next(rest) for _ in own], tensor.shape)
            for view, own, tensor in zip(views, blocks, tensors, strict=True)
        ]

    return Matrices([stack for own in blocks for stack in own], kept, join)


def entry_name(entry: str, block: int) -> str:
    """What a parameter's state calls an entry that a stage keeps of its block `block` of matrices."""
    return f"{entry}_{block}"
