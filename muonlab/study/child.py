"""The process of one run: it is forked, gets its GPU and its log, trains, and reports how the run ended."""

import mmap
import os
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Protocol

from muonlab.command import STOPPING, leave_quietly, listen, times_asked
from muonlab.errors import EnvironmentFault, MuonlabError, located
from muonlab.runtime import settle
from muonlab.train.config import RunConfig, read_config
from muonlab.train.place import leave_launcher


@dataclass(frozen=True)
class Result:
    """How one run ended: a RunRecord status, "environment" where the machine, the disk or a store refused something
    (EnvironmentFault), or "killed" where its process ended without a report; its cause and folder."""

    status: str
    cause: str = ""
    folder: Path | None = None


class Detachable(Protocol):
    """A file descriptor on its way to another process."""

    def detach(self) -> int:
        """The descriptor, in the process that calls it."""


class Gauge:
    """How far a run is: its process writes the number of finished steps, loss and max logit, and its parent reads them.

    They live in LAYOUT.size bytes of a nameless file, so that a kill leaves nothing behind.
    """

    LAYOUT = struct.Struct("qdd")

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            file.truncate(self.LAYOUT.size)
            self._fd = os.dup(file.fileno())
        self._map = mmap.mmap(self._fd, self.LAYOUT.size)

    @property
    def steps(self) -> int:
        """The number of finished steps; 0 before the first."""
        return self.LAYOUT.unpack(self._map[:])[0]

    @property
    def reading(self) -> tuple[float, float] | None:
        """The training loss (nats) and largest max logit last read from the device; None before the first step."""
        steps, loss, max_logit = self.LAYOUT.unpack(self._map[:])
        return (loss, max_logit) if steps else None

    def on_step(self, steps: int) -> None:
        """Write the number of finished steps."""
        self._map[:8] = struct.pack("q", steps)

    def on_reading(self, loss: float, max_logit: float) -> None:
        """Write what was read from the device, before its step is finished."""
        self._map[8:] = struct.pack("dd", loss, max_logit)

    def close(self) -> None:
        """Close the parent's descriptor, once the process was started."""
        os.close(self._fd)

    def __getstate__(self) -> object:
        return DupFd(self._fd)

    def __setstate__(self, descriptor: Detachable) -> None:
        self._fd = descriptor.detach()
        self._map = mmap.mmap(self._fd, self.LAYOUT.size)


def carry_out(values: Mapping[str, object], place: int, gauge: Gauge, pipe: Connection, log: Path) -> None:
    """The body of a run's process: train the settings in `values`, and send a Result."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    leave_launcher()
    try:
        result = _in_place(read_config(values), place, gauge)
    except MuonlabError as error:  # a plug-in that has changed since
        result = Result("failed", str(error))
    leave_quietly(0)
    print(f"{result.status}: {result.cause}" if result.cause else result.status)  # the log's last line
    with suppress(OSError):  # the parent was killed; its successor reads the record
        pipe.send(result)


def _in_place(config: RunConfig, place: int, gauge: Gauge) -> Result:
    """Train on the GPUs of a place."""
    if config.trainer.device != "cpu" and (gpus := visible_gpus()):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own_gpus(place, config.trainer.devices, gpus))
    return _attempt(config, gauge)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none if that is set but empty."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        [str(index) for index in range(torch.cuda.device_count())]
        if visible is None
        else [name for name in visible.split(",") if name]
    )


def own_gpus(place: int, devices: int, gpus: Sequence[str]) -> Sequence[str]:
    """The GPUs of the run in `place` (from 0), `devices` per run; with more runs than GPUs allow, runs share them."""
    first = place % max(1, len(gpus) // devices) * devices
    return gpus[first : first + devices]


def _attempt(config: RunConfig, gauge: Gauge) -> Result:
    try:
        _hear()
        from muonlab.train.run import train

        outcome = train(config, gauge.on_step, gauge.on_reading)
        return Result(outcome.status, outcome.cause, outcome.folder)
    except EnvironmentFault as error:
        return Result("environment", str(error))
    except MuonlabError as error:
        return Result("failed", str(error))
    except KeyboardInterrupt:  # before the first step, so nothing is lost
        return Result("interrupted", "stopped before the first step")
    except BaseException as error:
        if times_asked():  # a signal interrupted a library in its work
            return Result("interrupted", "stopped before the first step")
        cause = f"{type(error).__name__}: {error}"
        if _of_the_system(error):
            return Result("environment", cause)
        traceback.print_exc()
        return Result("failed", cause)


def _of_the_system(error: BaseException | None) -> bool:
    """Whether the system refused something: torch's RuntimeError for a full disk is caused by an OSError."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _hear() -> None:
    """Signals are held back from the fork (see pool.server) until here, where the run can stop in an orderly way."""
    listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def try_out(runs: Mapping[str, Mapping[str, object]], pipe: Connection) -> None:
    """The body of a process that builds what the runs {name: settings} would train, and sends the first mistake."""
    try:
        _hear()
        from muonlab.train.check import check_run

        settle(1)
        for name, values in runs.items():
            with located(name):
                check_run(read_config(values))
    except EnvironmentFault:
        pass  # not a mistake: runs wait until the machine allows it
    except MuonlabError as error:
        with suppress(OSError):  # the parent was killed
            pipe.send(str(error))
    except (KeyboardInterrupt, Exception):
        pass  # the parent is asked to stop too, and for a bug a run's log says more
    leave_quietly(0)
