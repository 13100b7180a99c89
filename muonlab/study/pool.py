"""One process per run, so that an out-of-memory kill or a segfault costs a single run, and no run pays for imports.

A fork server imports torch, Lightning and MLflow once and every run is forked from it: single-threaded, warm, and
with CUDA untouched, so that each child can get its own GPU. A fork server that was killed is started again.

When the parent stops in an orderly way, it asks its runs to save a checkpoint and stop. When it is killed, its runs
finish, holding their folders' leases; a later command waits for them and takes their results.
"""

import fcntl
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from pathlib import Path

from muonlab.command import STOPPING, times_asked
from muonlab.errors import MuonlabError
from muonlab.progress import Progress
from muonlab.record.owner import process_start
from muonlab.runtime import usable_cores
from muonlab.study.child import Gauge, Result, carry_out, try_out, visible_gpus
from muonlab.study.queue import Claim
from muonlab.study.standing import LiveRun, Standing
from muonlab.study.table import Table
from muonlab.train.config import RunConfig

# Seconds between two looks at the runs; until the next job is asked for again; that runs have to stop; and that they
# have once the user asks a second time.
LOOK, AGAIN, STOP, STOP_NOW = 0.25, 2.0, 60.0, 5.0
# A file in the folder of multiprocessing's sockets, which stays behind when a command is killed: the folder is ours.
MARK = "muonlab"
WARM = [
    "muonlab.train.run",
    "muonlab.train.module",
    "muonlab.train.recording",
    "muonlab.train.callbacks",
    "lightning.pytorch.callbacks",
    "mlflow",
]
# multiprocessing's exit code of a process whose fork server was killed.
NO_EXIT_CODE = 255


@dataclass(eq=False)
class Job:
    """One run to train: its settings, its label in logs and messages, and the claim that it fulfils."""

    config: RunConfig
    label: str
    claim: Claim | None = None
    gauge: Gauge = field(default_factory=Gauge, repr=False)
    process: BaseProcess = field(init=False, repr=False)
    pipe: Connection | None = field(default=None, repr=False)
    began: int | None = field(default=None, repr=False)
    result: Result | None = field(default=None, repr=False)
    place: int = 0

    @property
    def pid(self) -> int:
        """The process's id; it must have been started."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def lives(self) -> bool:
        """Whether its process is alive. If its fork server died, there is no exit code, so the system is asked."""
        code = self.process.exitcode
        orphan = code == NO_EXIT_CODE and self.began is not None
        return code is None or (orphan and process_start(self.pid) == self.began)

    @property
    def live(self) -> LiveRun:
        """How far the run is."""
        name = self.claim.slot.name if self.claim else self.label
        steps, (loss, max_logit) = self.gauge.steps, self.gauge.reading or (None, None)
        return LiveRun(name, steps - 1 if steps else None, self.config.trainer.max_steps, loss, max_logit)

    def receive(self) -> None:
        """Receive the run's report on how it ended, if it has arrived."""
        if self.pipe is not None and self.pipe.poll():
            with suppress(EOFError, OSError):
                self.result = self.pipe.recv()
            self.pipe.close()
            self.pipe = None

    def waitable(self) -> list[Connection | int]:
        """What becomes ready when the run reports or, after that, ends."""
        if self.pipe is not None:
            return [self.pipe]
        return [self.process.sentinel] if self.process.exitcode is None else []


def default_workers(devices: int) -> int:
    """How many runs of `devices` processes each fit on this machine's GPUs or, if it has none, on its cores."""
    return max(1, (len(visible_gpus()) or usable_cores()) // devices)


class Pool:
    """Runs jobs, `workers` at a time. Whatever a job prints goes into a text file of its own in `log_folder`."""

    def __init__(self, workers: int, log_folder: Path):
        if workers < 1:
            raise MuonlabError(f"the number of workers must be at least 1, not {workers}")
        self.workers, self.log_folder = workers, log_folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(WARM)
        self.running: list[Job] = []
        self._warm = False

    @staticmethod
    def say(line: str) -> None:
        """Print a line above the progress bar."""
        Progress.write(line)

    def try_out(self, runs: Mapping[str, RunConfig]) -> None:
        """Build, in a separate process, the model and optimizer of each run {name: settings}, without training.

        Raises MuonlabError for what a run would refuse.
        """
        ours, theirs = self.context.Pipe(duplex=False)
        values = {name: config.as_dict() for name, config in runs.items()}
        with suppress(OSError, EOFError), ours:  # nothing to report, or killed, as the runs will notice
            with theirs:
                server()
                self.context.Process(target=try_out, args=(values, theirs), daemon=True).start()
            raise MuonlabError(ours.recv())

    def run(
        self,
        next_job: Callable[[], Job | None],
        on_result: Callable[[Job, Result], None],
        title: str,
        total_jobs: int,
        total_steps: int,
        stands: Callable[[], Standing],
    ) -> int:
        """Start the jobs that `next_job` returns and pass each result to `on_result`, until nothing runs and `next_job`
        returns None. Returns the number of runs that ended. A Table of what `stands` reads is shown meanwhile.

        When the command is asked to stop, or `on_result` raises, the runs save a checkpoint and stop between two steps;
        then the exception is raised again.
        """
        table = Table(title, total_jobs, total_steps, stands)
        finished_steps, ended, asked = 0, 0, -math.inf
        self.log_folder.mkdir(parents=True, exist_ok=True)
        try:
            while True:
                if len(self.running) < self.workers and time.monotonic() - asked >= AGAIN:
                    while len(self.running) < self.workers and (job := next_job()) is not None:
                        if not self._start(job):
                            on_result(job, Result("environment", "no process could be started for the run"))
                    asked = time.monotonic()
                if not self.running:
                    break
                self._wait(LOOK)
                for job in self._ended():
                    ended += 1
                    finished_steps += job.config.trainer.max_steps
                    asked = -math.inf  # a place is free, and the slot may have become open again
                    on_result(job, self._result(job))
                steps = finished_steps + sum(job.gauge.steps for job in self.running)
                table.show(steps, ended, [job.live for job in self.running])
            return ended
        except BaseException:
            with suppress(OSError):  # the terminal is gone
                table.fold()
            self._stop(on_result)
            raise
        finally:
            with suppress(OSError):
                table.close()

    def _start(self, job: Job) -> bool:
        """False if the fork server was killed meanwhile."""
        taken = {other.place for other in self.running}
        job.place = next(place for place in range(self.workers) if place not in taken)
        job.pipe, theirs = self.context.Pipe(duplex=False)
        log = self.log_folder / f"{job.label}.log"
        arguments = (job.config.as_dict(), job.place, job.gauge, theirs, log)
        try:
            self._warm_up()
            job.process = self.context.Process(
                target=carry_out, args=arguments, name=f"muonlab {job.label}", daemon=True
            )
            with signals_wait():  # otherwise an unknown process would go on training
                job.process.start()
                job.began = process_start(job.pid)
                self.running.append(job)
        except (OSError, EOFError):
            self._warm = False
            job.pipe.close()
            return False
        finally:
            theirs.close()
            job.gauge.close()
        return True

    def _warm_up(self) -> None:
        """Wait for the fork server's imports; a signal may interrupt the wait."""
        if not self._warm:
            server()
            first = self.context.Process(target=_nothing, daemon=True)
            first.start()
            first.join()
            self._warm = True
        server()

    def _wait(self, seconds: float) -> None:
        wait([ready for job in self.running for ready in job.waitable()], timeout=seconds)
        for job in self.running:
            job.receive()

    def _ended(self) -> list[Job]:
        """Remove the jobs whose processes have ended from those running, and return them."""
        over = [job for job in self.running if not job.lives]
        for job in over:
            self.running.remove(job)
        return over

    def _result(self, job: Job) -> Result:
        job.receive()
        if job.result is not None:
            return job.result
        code = job.process.exitcode
        assert code is not None  # it ended
        if code == NO_EXIT_CODE:
            self._warm = False
            return Result(
                "environment", "the process was killed, and so was the fork server that it came from"
            )
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Result("killed", f"the process ended with {name}")

    def _stop(self, on_result: Callable[[Job, Result], None]) -> None:
        """Ask the runs to stop between two steps; those that do not are killed and lose the steps since their last
        checkpoint."""
        if self.running:
            with suppress(OSError):
                Progress.write(
                    f"stopping: saving checkpoints of {len(self.running)} runs ...", file=sys.stderr
                )
        asked, impatient = time.monotonic(), times_asked() > 1
        limit = STOP
        self._send(signal.SIGTERM)
        while self.running:
            self._wait(LOOK)
            if times_asked() > 1 and not impatient:
                impatient, limit = True, time.monotonic() - asked + STOP_NOW
            if time.monotonic() - asked > limit:
                self._send(signal.SIGKILL)
            for job in self._ended():
                result = self._result(job)
                if result.status == "killed":
                    result = Result("interrupted", "stopped within a step", result.folder)
                with suppress(
                    OSError, MuonlabError
                ):  # the others must stop, even if this result cannot be reported or recorded
                    on_result(job, result)

    def _send(self, number: int) -> None:
        for job in self.running:
            if job.lives:
                with suppress(ProcessLookupError):
                    os.kill(job.pid, number)


def _nothing() -> None:
    pass


def server() -> None:
    """Make sure that the fork server runs. It and its forks hold signals back until a run handles them, since a Ctrl-C
    or a hang-up of the terminal reaches every process of the command."""
    _claim_temporary_folder()
    resource_tracker.ensure_running()  # it unblocks signals when it starts
    with signals_wait():
        forkserver.ensure_running()


def _claim_temporary_folder() -> None:
    """Lock the folder of multiprocessing's sockets for as long as this process lives, and mark it as ours.

    The system releases the lock, whatever a full disk or a kill has done to files.
    """
    folder = get_temp_dir()
    with suppress(OSError):
        _lock(folder)
        (Path(folder) / MARK).touch()
    remove_dead_sockets()


def remove_dead_sockets() -> None:
    """Remove the socket folders of commands that were killed."""
    for mark in Path(tempfile.gettempdir()).glob(f"pymp-*/{MARK}"):
        with suppress(OSError):
            number = _open_locked(mark.parent)
            shutil.rmtree(mark.parent, ignore_errors=True)
            os.close(number)


@cache
def _lock(folder: str) -> int:
    return _open_locked(Path(folder))


def _open_locked(folder: Path) -> int:
    """Raises BlockingIOError if another process holds the lock."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(number)
        raise
    return number


@contextmanager
def signals_wait() -> Iterator[None]:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
