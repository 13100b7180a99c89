"""How a parameter is seen as matrices (out, in): whole, a stack, blocks of heads, a flattened filter."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from muonlab.errors import MuonlabError


@dataclass(frozen=True)
class MatrixView:
    """The matrices of one parameter that are orthogonalised apart from each other.

    - a parameter (rows, cols) is one matrix; (E, rows, cols) is a stack of E, such as experts;
    - `row_blocks` n cuts the rows into n equal blocks (the heads of a query, key or value weight); a tuple of
      sizes cuts unequal ones (a fused QKV weight);
    - `col_blocks` n cuts the columns into n equal blocks (the heads of an attention output weight);
    - `flatten` sees (out, in, *kernel) as one matrix (out, in * prod(kernel)); without it a filter is refused.
    """

    row_blocks: int | tuple[int, ...] = 1
    col_blocks: int = 1
    flatten: bool = False

    def __post_init__(self) -> None:
        sizes = self.row_blocks if isinstance(self.row_blocks, tuple) else (self.row_blocks,)
        if not sizes or any(
            isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in (*sizes, self.col_blocks)
        ):
            raise MuonlabError(
                "row_blocks must be a positive number of equal blocks or a list of block sizes, and col_blocks a "
                f"positive number of blocks, not {self.row_blocks!r} and {self.col_blocks!r}"
            )
        if self.col_blocks > 1 and self.row_blocks != 1:
            raise MuonlabError(
                "a matrix is cut along its rows (row_blocks) or its columns (col_blocks), not both"
            )

    def check(self, shape: torch.Size, name: str) -> None:
        """Raise MuonlabError if a parameter of this shape has no such view."""
        if len(shape) < 2:
            raise MuonlabError(
                f"{name} of shape {tuple(shape)} is not a matrix and cannot be under Muon; "
                "put it into a group with rule='adamw'"
            )
        if math.prod(shape) == 0:
            raise MuonlabError(f"{name} of shape {tuple(shape)} is empty and cannot be under Muon")
        if len(shape) > 3 and not self.flatten:
            raise MuonlabError(
                f"{name} of shape {tuple(shape)} looks like a convolution filter, which is not a matrix; "
                "set flatten=true to see it as (out, in * kernel), or put it into a group with rule='adamw'"
            )
        rows, cols = (shape[0], math.prod(shape[1:])) if self.flatten else shape[-2:]
        if isinstance(self.row_blocks, tuple) and sum(self.row_blocks) != rows:
            raise MuonlabError(
                f"{name}: row blocks {list(self.row_blocks)} add up to {sum(self.row_blocks)} of {rows} rows"
            )
        if isinstance(self.row_blocks, int) and rows % self.row_blocks:
            raise MuonlabError(f"{name}: {rows} rows cannot be cut into {self.row_blocks} equal blocks")
        if cols % self.col_blocks:
            raise MuonlabError(f"{name}: {cols} columns cannot be cut into {self.col_blocks} equal blocks")

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Stacks (..., rows, cols) of matrices to orthogonalise; views of `tensor` where its strides allow."""
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
            matrix = torch.cat(blocks, dim=-2)
        elif self.row_blocks > 1:
            matrix = blocks[0].flatten(-3, -2)
        elif self.col_blocks > 1:
            matrix = blocks[0].transpose(-2, -3).flatten(-2, -1)
        else:
            matrix = blocks[0]
        return matrix.reshape(shape)

    def describe(self, shape: torch.Size) -> str:
        """The view in words for the routing table: "64 x 64", "8 of 32 x 64", "1536 x 512 + 512 x 512"."""
        return " + ".join(
            (f"{math.prod(block[:-2])} of " if math.prod(block[:-2]) > 1 else "")
            + f"{block[-2]} x {block[-1]}"
            for block in self.block_shapes(shape)
        )

    def block_shapes(self, shape: torch.Size) -> list[torch.Size]:
        """Shapes that `split` returns for a parameter of this shape."""
        return [block.shape for block in self.split(torch.empty(shape, device="meta"))]
