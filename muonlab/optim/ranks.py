"""Several ranks: parameters that are spread over them (DTensor, as FSDP2 makes them), and matrices that they share.

`Ranks` deals the matrices out: each rank transforms its own, and every rank gets the results. Where every rank holds
all parameters and equal gradients (DDP), the results go to all in one gather. Where each rank holds some rows of every
parameter (FSDP2), one exchange brings the rows of a matrix to its owner and another brings the result back, so a
parameter is never whole on a rank that does not own it. Either way each matrix is computed once, and all ranks hold the
same bits.

A tensor that knows its device mesh is sharded; asking for its class would import DTensor, which takes half a second,
where nobody has one.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.matrix_view import Kept, Matrices, MatrixView, State, entry_name

Shapes = Sequence[torch.Size]  # of whole parameters


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank may hold only a part of the tensor."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """The rows that this rank holds, as a view to be written to; a tensor of one process is all here."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank, detached; a collective where it is sharded."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()  # type: ignore[attr-defined]


def spread_like(param: Tensor, value: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, held as the parameter is: this rank keeps its rows."""
    if not is_sharded(param) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every rank has the whole of it, so nothing need be sent.
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)  # type: ignore[attr-defined]


def check_placement(param: Tensor, name: str) -> None:
    """Raise MuonlabError for a parameter that is spread in another way than by rows over one group of ranks."""
    if not is_sharded(param):
        return
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise MuonlabError(
            f"{name} is spread over ranks as {placements}; Muon takes parameters that are whole on every rank (DDP),"
            " or cut along their first dimension over one group of ranks (FSDP2)"
        )


def gathered(state: Any, keep: bool = True) -> Any:
    """The same nested state with whole tensors on the CPU, so that it loads at every world size; a collective.

    keep: whether this rank wants it; the others take part and keep None in each sharded tensor's place.
    """
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value, keep) for value in state)
    if not isinstance(state, Tensor):
        return state
    everything = whole(state)
    return everything.cpu() if keep else None


# ---------------------------------------------------------------- who transforms what
@dataclass(frozen=True, eq=False)
class Run:
    """Whole matrices of one parameter that lie together: its rows from `start` to `stop` along dim 0, seen as `view`.

    `blocks` numbers its blocks of matrices among the parameter's; `part` is the run's share of each, a number for one.
    """

    param: int
    start: int
    stop: int
    view: MatrixView
    blocks: tuple[int, ...]
    part: slice | int | None  # None: all
    owner: int = 0

    def kept(self, state: State, entries: Sequence[str]) -> list[Kept]:
        """These entries of each block, as views to be written to."""
        here = slice(None) if self.part is None else self.part
        return [{entry: state[entry_name(entry, j)][here] for entry in entries} for j in self.blocks]


def rows_held(rows: int, rank: int, world: int) -> tuple[int, int]:
    """First and last + 1 of the rows that a rank holds of `rows` in all, as torch.chunk and DTensor cut them."""
    size = -(-rows // world)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def cut_into_runs(param: int, shape: torch.Size, view: MatrixView, most: int) -> list[Run]:
    """A parameter as at most `most` runs of whole matrices (unequal row blocks: one run per block).

    A stack is cut between its matrices, equal row blocks between blocks, in both cases where FSDP2 would cut if the
    number of ranks divides theirs. Anything else is one run.
    """
    blocks = tuple(range(len(view.block_shapes(shape))))
    if len(shape) == 3 and not view.flatten:
        pieces = [rows_held(shape[0], i, most) for i in range(most)]
        return [Run(param, a, b, view, blocks, slice(a, b)) for a, b in pieces if a < b]
    if isinstance(view.row_blocks, tuple):
        ends = [sum(view.row_blocks[: i + 1]) for i in range(len(view.row_blocks))]
        one = replace(view, row_blocks=1)
        return [
            Run(param, end - size, end, one, (block,), None)
            for end, size, block in zip(ends, view.row_blocks, blocks, strict=True)
        ]
    if view.row_blocks > 1:
        h = shape[0] // view.row_blocks
        pieces = [rows_held(view.row_blocks, i, most) for i in range(most)]
        return [
            Run(param, a * h, b * h, replace(view, row_blocks=b - a), blocks, slice(a, b) if b - a > 1 else a)
            for a, b in pieces
            if a < b
        ]
    return [Run(param, 0, shape[0], view, blocks, None)]


def work(shape: torch.Size, view: MatrixView) -> int:
    """Multiplications of a Newton-Schulz step on all matrices of a parameter, up to a common factor (backend.cost)."""
    total = 0
    for *stack, rows, cols in view.block_shapes(shape):
        n, m = min(rows, cols), max(rows, cols)
        total += math.prod(stack) * n * n * (2 * m + n)
    return total


@lru_cache(maxsize=64)
def deal(
    shapes: tuple[torch.Size, ...], views: tuple[MatrixView, ...], world: int, sharded: bool
) -> tuple[Run, ...]:
    """All runs of these parameters with an owner each, the same on every rank.

    A run that lies whole on one rank is that rank's. The others go, largest first, to the rank with the least work so
    far, which is within a third of the best (Graham, 1969).
    """
    load = [0] * world
    settled, open_runs = [], []
    for i, (shape, view) in enumerate(zip(shapes, views, strict=True)):
        for run in cut_into_runs(i, shape, view, world):
            cost = work(_shape(run, shape), run.view)
            at = run.start // -(-shape[0] // world)
            if sharded and run.stop <= rows_held(shape[0], at, world)[1]:
                settled.append(replace(run, owner=at))
                load[at] += cost
            else:
                open_runs.append((cost, run))
    waiting = [(amount, rank) for rank, amount in enumerate(load)]
    heapq.heapify(waiting)
    for cost, run in sorted(open_runs, key=lambda item: -item[0]):
        amount, rank = heapq.heappop(waiting)
        settled.append(replace(run, owner=rank))
        heapq.heappush(waiting, (amount + cost, rank))
    return tuple(sorted(settled, key=lambda run: (run.param, run.start)))


def _shape(run: Run, shape: torch.Size) -> torch.Size:
    return torch.Size((run.stop - run.start, *shape[1:]))


class Ranks:
    """The ranks of `group`, which update the same parameters; `sharded`: each holds some rows of every parameter."""

    def __init__(self, group: dist.ProcessGroup | None, sharded: bool):
        self.group, self.sharded = group, sharded
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._all = range(self.world)

    @classmethod
    def of(cls, params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> "Ranks | None":
        """Those that share the work on these parameters (all of them sharded, or none); None: this process does all."""
        sharded = is_sharded(params[0])
        if sharded:
            process_group = params[0].device_mesh.get_group()  # type: ignore[attr-defined]
        elif process_group is None:
            return None
        ranks = cls(process_group, sharded)
        return ranks if ranks.world > 1 else None

    def matrices(
        self,
        tensors: Sequence[Tensor],
        shapes: Shapes,
        views: Sequence[MatrixView],
        states: Sequence[State],
        entries: Sequence[str],
    ) -> Matrices:
        """As `matrix_view.matrices`, but only those that this rank owns; `join` is a collective.

        tensors: what this rank holds of each parameter. shapes: of the whole parameters. Entries are the same on every
        rank once `join` has returned.
        """
        runs = deal(tuple(shapes), tuple(views), self.world, self.sharded)
        mine = [run for run in runs if run.owner == self.rank]
        inputs = self._collect(runs, mine, shapes, tensors)
        stacks = [run.view.split(x) for run, x in zip(mine, inputs, strict=True)]
        kept = {run: run.kept(states[run.param], entries) for run in runs}

        def join(transformed: Sequence[Tensor]) -> list[Tensor]:
            rest = iter(transformed)
            results = [
                run.view.join([next(rest) for _ in own], x.shape)
                for run, own, x in zip(mine, stacks, inputs, strict=True)
            ]
            if entries:
                self._spread_entries(runs, kept, tensors[0])
            if self.sharded:
                return self._give_back(runs, mine, shapes, results, tensors[0])
            return self._share(runs, shapes, results, tensors[0])

        return Matrices(_chain(stacks), [entry for run in mine for entry in kept[run]], join)

    def _share(
        self, runs: Sequence[Run], shapes: Shapes, results: Sequence[Tensor], like: Tensor
    ) -> list[Tensor]:
        """The results of all ranks, whole."""
        sizes = [
            [_shape(run, shapes[run.param]).numel() for run in runs if run.owner == k] for k in self._all
        ]
        places = [iter(values) for values in self._to_all(results, sizes, like)]
        parts: list[list[Tensor]] = [[] for _ in shapes]
        for run in runs:
            parts[run.param].append(next(places[run.owner]).view(_shape(run, shapes[run.param])))
        return [own[0] if len(own) == 1 else torch.cat(own) for own in parts]

    def _spread_entries(self, runs: Sequence[Run], kept: dict[Run, list[Kept]], like: Tensor) -> None:
        """Give every rank the entries that their owners have advanced."""
        targets = [
            [value for run in runs if run.owner == k for entries in kept[run] for value in entries.values()]
            for k in self._all
        ]
        sizes = [[value.numel() for value in own] for own in targets]
        for own, values in zip(targets, self._to_all(targets[self.rank], sizes, like), strict=True):
            for target, value in zip(own, values, strict=True):
                target.copy_(value.view(target.shape))

    def _collect(
        self, runs: Sequence[Run], mine: Sequence[Run], shapes: Shapes, directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """The directions of this rank's runs, whole."""
        if not self.sharded:
            return [directions[run.param][run.start : run.stop] for run in mine]
        sent = [
            [self._rows(run, shapes, self.rank, directions[run.param]) for run in runs if run.owner == k]
            for k in self._all
        ]
        sizes = [[self._count(run, shapes, k) for run in mine] for k in self._all]
        received = self._exchange(sent, sizes, directions[0])
        return [
            torch.cat([received[k][i] for k in self._all]).view(_shape(run, shapes[run.param]))
            for i, run in enumerate(mine)
        ]

    def _give_back(
        self,
        runs: Sequence[Run],
        mine: Sequence[Run],
        shapes: Shapes,
        results: Sequence[Tensor],
        like: Tensor,
    ) -> list[Tensor]:
        """Every rank's rows of all results."""
        sent = [
            [self._rows(run, shapes, k, result, run.start) for run, result in zip(mine, results, strict=True)]
            for k in self._all
        ]
        sizes = [[self._count(run, shapes, self.rank) for run in runs if run.owner == k] for k in self._all]
        places = [iter(values) for values in self._exchange(sent, sizes, like)]
        parts: list[list[Tensor]] = [[] for _ in shapes]
        for run in runs:
            parts[run.param].append(next(places[run.owner]))
        own = [rows_held(shape[0], self.rank, self.world) for shape in shapes]
        return [
            torch.cat(part).view(stop - start, *shape[1:])
            for part, shape, (start, stop) in zip(parts, shapes, own, strict=True)
        ]

    def _overlap(self, run: Run, shapes: Shapes, rank: int) -> tuple[int, int]:
        """The rows of a run that a rank holds, counted from the parameter's first; none: (start, start)."""
        start, stop = rows_held(shapes[run.param][0], rank, self.world)
        start = min(max(start, run.start), run.stop)
        return start, max(start, min(stop, run.stop))

    def _count(self, run: Run, shapes: Shapes, rank: int) -> int:
        start, stop = self._overlap(run, shapes, rank)
        return (stop - start) * shapes[run.param][1:].numel()

    def _rows(self, run: Run, shapes: Shapes, rank: int, held: Tensor, first: int | None = None) -> Tensor:
        """The rows of a run that `rank` holds, out of `held`, whose first row is the parameter's row `first`."""
        start, stop = self._overlap(run, shapes, rank)
        if first is None:
            first = rows_held(shapes[run.param][0], self.rank, self.world)[0]
        return held[start - first : stop - first] if start < stop else held[:0]

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], like: Tensor
    ) -> list[list[Tensor]]:
        """Send `sent[k]` to rank k, and receive from each rank flat tensors of `sizes[k]`."""
        outgoing = _flat(_chain(sent), like)
        lengths = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
        incoming = like.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(incoming, outgoing, [sum(own) for own in sizes], lengths, group=self.group)
        return _parted(incoming, sizes)

    def _to_all(
        self, sent: Sequence[Tensor], sizes: Sequence[Sequence[int]], like: Tensor
    ) -> list[list[Tensor]]:
        """Send these to every rank, and receive from rank k flat tensors of `sizes[k]`."""
        longest = max(map(sum, sizes))
        outgoing = like.new_zeros(longest)
        flat = _flat(sent, like)
        outgoing[: flat.numel()] = flat
        incoming = like.new_empty(self.world * longest)
        dist.all_gather(list(incoming.chunk(self.world)), outgoing, group=self.group)
        return [
            list(incoming[k * longest :][: sum(own)].split(list(own))) if own else []
            for k, own in enumerate(sizes)
        ]


def _chain(lists: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    return [tensor for own in lists for tensor in own]


def _flat(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else like.new_empty(0)


def _parted(flat: Tensor, sizes: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    parts = iter(flat.split([size for own in sizes for size in own]))
    return [[next(parts) for _ in own] for own in sizes]
