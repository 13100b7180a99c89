"""One process per run, so that an out-of-memory kill or a segfault costs one run, and none pays the imports.

A fork server imports torch, Lightning and MLflow once and every run is forked from it: single-threaded, warm, and
with CUDA untouched, so that each child can be given its own GPU.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from muonlab.errors import MuonlabError
from muonlab.runtime import usable_cores
from muonlab.study.queue import Claim
from muonlab.train.config import RunConfig, read_config

WARM = [
    "muonlab.train.run",
    "muonlab.train.module",
    "muonlab.train.recording",
    "muonlab.train.callbacks",
    "lightning.pytorch.callbacks",
    "mlflow",
]


@dataclass(frozen=True)
class Result:
    """How one run ended: a RunRecord status, or "killed" where its process ended without a word; cause and folder."""

    status: str
    cause: str = ""
    folder: Path | None = None


@dataclass
class Job:
    """One run to do: its settings, its label for log and progress, and the claim that it fulfils."""

    config: RunConfig
    label: str
    claim: Claim | None = None
    steps: Any = field(default=None, repr=False)
    process: Any = field(default=None, repr=False)
    pipe: Connection | None = field(default=None, repr=False)
    place: int = 0


def default_workers() -> int:
    """As many runs at once as this machine has GPUs, or else processor cores."""
    import torch

    return torch.cuda.device_count() or usable_cores()


def _child(values: Mapping[str, Any], place: int, steps: Any, pipe: Connection, log: Path) -> None:
    """The body of a run's process: train, and report to the parent how it went."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    config = read_config(values)
    if config.trainer.devices == 1 and config.trainer.device != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(place)
        elif visible:  # an empty list hides all GPUs, and goes on doing so
            gpus = visible.split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]

    def on_step(step: int) -> None:
        steps.value = step

    try:
        from muonlab.train.run import train

        outcome = train(config, on_step)
        pipe.send(Result(outcome.status, outcome.cause, outcome.folder))
    except MuonlabError as error:
        pipe.send(Result("failed", str(error)))
    except KeyboardInterrupt:  # before the first step, where nothing is lost yet
        pipe.send(Result("interrupted", "stopped before the first step"))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(Result("failed", f"{type(error).__name__}: {error}"))


class Pool:
    """Runs jobs, `workers` at a time. `log_folder` gets one text file per job with whatever it printed."""

    def __init__(self, workers: int, log_folder: Path):
        if workers < 1:
            raise MuonlabError(f"the number of workers must be at least 1, not {workers}")
        self.workers, self.log_folder = workers, log_folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(WARM)
        self.running: list[Job] = []

    @staticmethod
    def say(line: str) -> None:
        """Print a line above the progress bar."""
        tqdm.write(line)

    def run(
        self,
        next_job: Callable[[], Job | None],
        on_result: Callable[[Job, Result], None],
        title: str,
        total_jobs: int,
        total_steps: int,
    ) -> None:
        """Start what `next_job` gives until it gives None and everything has ended; report each end to `on_result`.

        On Ctrl-C the runs stop between two steps and keep a checkpoint; then KeyboardInterrupt is raised.
        """
        bar = self._bar(title, total_steps)
        finished_steps, ended, more = 0, 0, True
        self.log_folder.mkdir(parents=True, exist_ok=True)
        try:
            while more or self.running:
                while more and len(self.running) < self.workers:
                    job = next_job()
                    more = job is not None
                    if job is not None:
                        self._start(job)
                if not self.running:
                    break
                wait([job.process.sentinel for job in self.running], timeout=0.25)
                for job in [j for j in self.running if not j.process.is_alive()]:
                    self.running.remove(job)
                    result = self._result(job)
                    ended += 1
                    finished_steps += job.config.trainer.max_steps
                    on_result(job, result)
                    more = True  # the slot may be open again
                bar.update(finished_steps + sum(j.steps.value for j in self.running) - bar.n)
                bar.set_postfix_str(f"{ended}/{total_jobs} runs", refresh=False)
        except KeyboardInterrupt:
            bar.write(f"stopping: saving checkpoints of {len(self.running)} runs ...", file=sys.stderr)
            self._stop(on_result)
            raise
        finally:
            bar.close()

    @staticmethod
    def _bar(title: str, total_steps: int) -> tqdm:
        terminal = sys.stderr.isatty()
        return tqdm(
            total=total_steps,
            desc=title,
            unit="step",
            mininterval=0.5 if terminal else 15,
            dynamic_ncols=terminal,
            smoothing=0.05,
        )

    def _start(self, job: Job) -> None:
        taken = {other.place for other in self.running}
        job.place = next(place for place in range(self.workers) if place not in taken)
        job.steps = self.context.Value("q", 0, lock=False)
        job.pipe, theirs = self.context.Pipe(duplex=False)
        log = self.log_folder / f"{job.label}.log"
        arguments = (job.config.as_dict(), job.place, job.steps, theirs, log)
        job.process = self.context.Process(
            target=_child, args=arguments, name=f"muonlab {job.label}", daemon=True
        )
        job.process.start()
        theirs.close()
        self.running.append(job)

    def _result(self, job: Job) -> Result:
        job.process.join()
        code = job.process.exitcode
        assert job.pipe is not None
        try:
            return job.pipe.recv()
        except EOFError:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Result("killed", f"the process ended with {name}")
        finally:
            job.pipe.close()

    def _stop(self, on_result: Callable[[Job, Result], None]) -> None:
        # In a terminal Ctrl-C reached the children too; SIGTERM asks for the same clean stop where it did not.
        asked = time.monotonic()
        for job in self.running:
            if job.process.is_alive():
                os.kill(job.process.pid, signal.SIGTERM)
        while self.running:
            wait([job.process.sentinel for job in self.running], timeout=0.5)
            for job in [j for j in self.running if not j.process.is_alive()]:
                self.running.remove(job)
                on_result(job, self._result(job))
            if time.monotonic() - asked > 60:
                for job in self.running:
                    job.process.kill()
