"""The processes of a run as one of them sees them: joint decisions, and how the loss of one shows."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from muonlab.errors import EnvironmentFault
from muonlab.train.place import Place

Decision = TypeVar("Decision")


class Peers:
    """This process and the others of its run, which meet when it is created; a single process decides for itself.

    Messages between them go from host to host and never wait for a device.
    """

    def __init__(self, place: Place, accelerator: str):
        self.place = place
        self._hosts: dist.ProcessGroup | None = None
        if place.world == 1:
            return
        os.environ.setdefault("MASTER_ADDR", place.address)
        os.environ.setdefault("MASTER_PORT", str(place.port))
        if accelerator == "cpu":
            dist.init_process_group("gloo", rank=place.rank, world_size=place.world)
            self._hosts = dist.group.WORLD
        else:
            device = torch.device(accelerator, place.local_rank)
            dist.init_process_group("nccl", rank=place.rank, world_size=place.world, device_id=device)
            self._hosts = dist.new_group(backend="gloo")

    def part(self, lost: bool) -> None:
        """Leave the process group in order; a process that ends without it is aborted if the others were faster.

        lost: one of them is gone; NCCL would wait for it.
        """
        if self._hosts is not None and not (lost and dist.get_backend() == "nccl"):
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process keeps the record."""
        return self.place.rank == 0

    def from_first(self, decide: Callable[[], Decision]) -> Decision:
        """The decision of the first process; the others do not call `decide`."""
        if self._hosts is None:
            return decide()
        decision = [decide() if self.first else None]
        dist.broadcast_object_list(decision, src=0, group=self._hosts)
        return decision[0]  # type: ignore[return-value]

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers; all must call it at the same point."""
        if self._hosts is None:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._hosts)
        return int(numbers)


def lost_peer(error: BaseException | None) -> bool:
    """Whether this error shows, to a process waiting for the others, that one of them is gone."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return together and (
        isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    )


def peer_fault() -> EnvironmentFault:
    """The error for a lost process."""
    return EnvironmentFault(
        f"another process of this run of {dist.get_world_size()} is gone; rerun the same command to resume from the"
        " last checkpoint"
    )
