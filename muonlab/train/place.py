"""Which of a run's processes this one is, by the environment variables of its launcher."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from muonlab.errors import MuonlabError, shown

_LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True)
class Place:
    """rank: of this process among the `world` of the run; local_rank: among those of its machine, `node`.

    The processes meet at `address`:`port`, on the machine of rank 0.
    """

    rank: int = 0
    local_rank: int = 0
    node: int = 0
    world: int = 1
    address: str = "127.0.0.1"
    port: int = 0


def find_place(devices: int, environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a launcher gave this process in a run of `devices` processes per machine; None without a launcher.

    Read in turn: RANK and WORLD_SIZE (torchrun), LOCAL_RANK and NODE_RANK (muonlab itself, Lightning), SLURM_PROCID and
    SLURM_NTASKS (srun, except in an interactive job, as in Lightning). A run of one device is one process whatever
    the environment says: a batch system's variables describe the job around it. Raises MuonlabError where the number of
    processes that torchrun or srun started differs from the devices of the run.
    """
    read = _Numbers(environment)
    if "TORCHELASTIC_RUN_ID" in environment:
        started = read("LOCAL_WORLD_SIZE", devices)
        _check(started == devices, f"torchrun started {started} processes on this machine", devices)
    if devices == 1:
        return Place()
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world = read("RANK"), read("WORLD_SIZE")
        _check(world % devices == 0, f"WORLD_SIZE says that {world} processes were started", devices)
        local_rank = read("LOCAL_RANK", rank % devices)
        return Place(rank, local_rank, rank // devices, world, *_meeting_point(environment))
    if "LOCAL_RANK" in environment:
        local_rank, node = read("LOCAL_RANK"), read("NODE_RANK", 0)
        world = read("WORLD_SIZE", devices)
        return Place(node * devices + local_rank, local_rank, node, world, *_meeting_point(environment))
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_PROCID" in environment and read("SLURM_NTASKS", 1) > 1 and not interactive:
        rank, world = read("SLURM_PROCID"), read("SLURM_NTASKS")
        nodes = read("SLURM_NNODES", 1)
        _check(world == nodes * devices, f"srun started {world} tasks on {nodes} machines", devices)
        local_rank = read("SLURM_LOCALID", rank % devices)
        return Place(
            rank, local_rank, read("SLURM_NODEID", rank // devices), world, *_meeting_point(environment)
        )
    return None


def is_first(devices: int) -> bool:
    """Whether this process keeps the record and prints for the run."""
    place = find_place(devices)
    return place is None or place.rank == 0


def leave_launcher() -> None:
    """Drop the launcher's variables: they describe the surrounding command, and its runs start their own processes."""
    for name in [*os.environ]:
        if name in _LAUNCHER or name.startswith(("SLURM_", "TORCHELASTIC_")):
            del os.environ[name]


def _meeting_point(environment: Mapping[str, str]) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, or else, under srun, the first machine and a port made of the job's number."""
    read = _Numbers(environment)
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "127.0.0.1"))
    # "gpu[03-05,9],login1": the first of the list, and of a range
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
    port = 15000 + read("SLURM_JOB_ID", 0) % 10000
    return environment.get("MASTER_ADDR", first), read("MASTER_PORT", port)


def _check(fits: bool, what: str, devices: int) -> None:
    if not fits:
        raise MuonlabError(
            f"{what}, but trainer.devices={devices}; start one process for each of a machine's devices"
        )


class _Numbers:
    """Reads integers from the environment; raises MuonlabError for other text."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = environment

    def __call__(self, name: str, default: int | None = None) -> int:
        text = self.environment.get(name)
        if text is None and default is not None:
            return default
        try:
            return int(text or "")
        except ValueError:
            raise MuonlabError(f"${name} must be a whole number, not {shown(text)}") from None
