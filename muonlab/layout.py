"""What a model declares about its parameters, which is all that an optimizer may know of it.

Two facts per model: the *role* of every parameter (which decides who optimizes it and how it is seen as a
matrix), and the *attention layout* of every attention layer: which rows of which weight make head h's query
and key. QK-Clip is one rule over that declaration, so MHA, MQA, GQA, partial rotary and MLA need no special cases.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muonlab.errors import MuonlabError

ROLES = (
    "query",
    "key",
    "value",
    "qkv",
    "output",
    "latent",
    "mlp",
    "expert",
    "router",
    "gate",
    "sink",
    "embedding",
    "head",
    "norm",
    "bias",
    "conv",
)


@dataclass(frozen=True)
class ParameterRole:
    """What one parameter is for.

    `role` is one of ROLES. `num_heads` says how many equal blocks its heads make: of rows for query, key and
    value, of columns for output; 0 means that the matrix has no heads. A `latent` is a down-projection that the
    heads share (MLA) and a norm follows. A `gate` scales another map's output; a `sink` is a logit per head that takes
    weight from the keys. A `qkv` is query, key and value in one weight, each with as many rows as
    `row_blocks` says; its heads are those of all three. An `expert` is a stack (experts, rows, cols); everything
    else that is orthogonalised is (rows, cols) = (out, in).
    """

    role: str
    num_heads: int = 0
    row_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise MuonlabError(f"unknown parameter role '{self.role}'; known: {', '.join(ROLES)}")


@dataclass(frozen=True, eq=False)
class HeadRows:
    """The rows of one weight or bias that belong to each head.

    Head i owns `rows` consecutive entries along `dim`, starting at `offset + i * stride`. `stride` 0 means
    `rows`: heads lie side by side. A fused QKV weight is described by offsets, an interleaved one by the stride, a
    weight kept as (in, out) by dim=1. Raises MuonlabError for blocks that overlap or leave the weight.
    """

    parameter: nn.Parameter
    rows: int
    offset: int = 0
    stride: int = 0
    dim: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.parameter, Tensor):
            raise MuonlabError(
                f"head rows of a {type(self.parameter).__name__}; expected a weight or bias tensor"
            )
        shape = tuple(self.parameter.shape)
        if not -len(shape) <= self.dim < len(shape):
            raise MuonlabError(
                f"heads along dim {self.dim} of a weight {shape}, which has {len(shape)} dimensions"
            )
        if self.rows < 1 or self.offset < 0 or (self.stride and self.stride < self.rows):
            raise MuonlabError(
                f"rows {self.rows}, offset {self.offset}, stride {self.stride} of heads in a weight {shape}:"
                " rows must be at least 1, the offset at least 0, the stride 0 or at least the rows"
            )

    def start(self, head: int) -> int:
        """First entry along `dim` of `head`."""
        return self.offset + head * (self.stride or self.rows)

    def row_indices(self, heads: int) -> Tensor:
        """(heads, rows) int64: the entries along `dim` of each of the first `heads` heads."""
        return torch.tensor([self.start(head) for head in range(heads)])[:, None] + torch.arange(self.rows)


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """Which parameters make the logits of one attention layer.

    `name` is the layer's key in `max_logits()`. Query head h reads key head
    h // (num_heads // num_kv_heads). `query` and `key` are scaled so that the logit of head h falls by
    gamma_h; they must list the biases too. `query_shared_key` are query rows that meet a key shared by all
    heads (the rotary part of MLA) or fixed, which must carry the whole gamma themselves. The logit meant is
    the scaled product q.k alone, before soft-cap and additive biases (ALiBi), neither of which a weight can
    scale.
    `inert` is empty, or the reason why scaling these rows cannot move the logits (QK-norm).
    `shared_key` are the rows of the key that `query_shared_key` meets, as one head; () where it is fixed. QuacK reads
    them, and no clip scales them.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    query: tuple[HeadRows, ...]
    key: tuple[HeadRows, ...]
    query_shared_key: tuple[HeadRows, ...] = ()
    inert: str = ""
    shared_key: tuple[HeadRows, ...] = ()

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise MuonlabError(
                f"{self.name}: {self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly"
            )
        if not self.inert and bool(self.query) != bool(self.key):
            raise MuonlabError(
                f"{self.name}: query and key rows must be declared together; query rows whose key is shared"
                " or fixed belong in query_shared_key"
            )
        if self.shared_key and not self.query_shared_key:
            raise MuonlabError(
                f"{self.name}: a shared_key is declared, but no query_shared_key that meets it"
            )
        if not (self.inert or self.query or self.query_shared_key):
            raise MuonlabError(f"{self.name}: no query rows are declared, so nothing can scale its logits")
        for blocks, heads in (
            (self.query, self.num_heads),
            (self.query_shared_key, self.num_heads),
            (self.key, self.num_kv_heads),
            (self.shared_key, 1),
        ):
            for block in blocks:
                size, end = block.parameter.shape[block.dim], block.start(heads - 1) + block.rows
                if end > size:
                    raise MuonlabError(
                        f"{self.name}: head {heads - 1} ends at row {end} of a weight with {size}"
                    )
