"""Run the slots of a study: take open ones in turn, each in a process of its own, until none is left."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from muonlab.record import Run, load_run
from muonlab.record.state import read_state, writer_alive
from muonlab.study.pool import Job, Pool, Result
from muonlab.study.queue import Claim, Queue
from muonlab.study.slots import Slot
from muonlab.train.config import RunConfig
from muonlab.train.run import OVER, run_folder

# A run that is killed is run once more, since the cause may lie outside; then it is missing, as one that fails is.
ATTEMPTS = 2
# The loss in nats that Optuna's samplers see of a run that diverged before its first step.
WORST_LOSS = 100.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Missing:
    """A slot without a finished run: why, and the log of its last attempt."""

    slot: Slot
    cause: str


def finished_run(config: RunConfig) -> Path | None:
    """The folder of the run that these settings describe, if it is over."""
    folder = run_folder(config)
    state = read_state(folder)
    return folder if state and state.get("status") in OVER else None


def being_written(folder: Path) -> bool:
    """Whether a process that may still live is writing the run in `folder`."""
    return writer_alive(folder) is not False


def objective(run: Run) -> float:
    """What a run that is over counts with, in nats (see analysis.frames.settled_loss): the rule of sweeps and
    experiments alike."""
    from analysis.frames import settled_loss

    first = float(run.steps["train_loss"].iloc[0]) if len(run.steps) else WORST_LOSS
    return settled_loss(run.metrics.get("val_loss", float("nan")), first, run.status)


class Worker:
    """Takes slots of one study on this machine.

    `parent_run_id`: the MLflow run under which its runs are shown.
    """

    def __init__(self, queue: Queue, pool: Pool, parent_run_id: str | None = None):
        self.queue, self.pool, self.parent_run_id = queue, pool, parent_run_id
        self._failures: Counter[str] = Counter()
        self._causes: dict[str, str] = {}
        self._over: dict[str, Path] = {}

    def folder(self, slot: Slot) -> Path | None:
        """The folder of the slot's run, if it is over."""
        if slot.name not in self._over:
            drawn = self.queue.drawn(slot)
            if drawn is not None and (folder := finished_run(drawn.config)):
                self._over[slot.name] = folder
        return self._over.get(slot.name)

    def run(self, slots: Sequence[Slot], title: str, wait: bool) -> list[Missing]:
        """Run what is open, and return what is still missing.

        A run that several slots share is trained once. `wait`: stay until other workers have ended what they have, and
        take it up if they die. On Ctrl-C running runs keep a checkpoint, their slots are open again, and
        KeyboardInterrupt is raised.
        """
        self._settle_abandoned(slots)
        announced = False
        # Of the slots that share a run every worker takes the first, so that nobody trains it a second time.
        first = list(
            {slot.name if slot.drawn else run_folder(slot.config): slot for slot in reversed(slots)}.values()
        )
        while todo := [slot for slot in reversed(first) if self._open(slot)]:
            others = self._busy(todo)
            if len(others) < len(todo):
                self._run(todo, title)
                continue
            if not wait:
                break
            if not announced:
                self.pool.say(f"waiting for {len(others)} runs of other workers ...")
                announced = True
            time.sleep(1)
        self._settle_abandoned(slots)
        return [
            Missing(slot, self._causes.get(slot.name, "not run yet"))
            for slot in slots
            if self.folder(slot) is None
        ]

    def _open(self, slot: Slot) -> bool:
        return self._failures[slot.name] < ATTEMPTS and self.folder(slot) is None

    def _busy(self, slots: Sequence[Slot]) -> list[Slot]:
        """Those that a living worker has, or whose run outlived its worker and is still being written."""
        taken = self.queue.busy(slots)
        drawn = [(slot, self.queue.drawn(slot)) for slot in slots]
        return [
            slot
            for slot, known in drawn
            if slot.name in taken or (known is not None and being_written(run_folder(known.config)))
        ]

    def _run(self, todo: Sequence[Slot], title: str) -> None:
        steps = sum(slot.config.trainer.max_steps for slot in todo)
        self.pool.run(lambda: self._next_job(todo), self._on_result, title, len(todo), steps)

    def _next_job(self, todo: Sequence[Slot]) -> Job | None:
        for slot in todo:
            if not self._open(slot) or self._busy([slot]):
                continue
            claim = self.queue.claim(slot)
            if claim is None:
                continue
            if folder := finished_run(claim.slot.config):  # another worker ended it in between
                self._finish(claim, Result(load_run(folder).status, folder=folder))
                continue
            return Job(self._config(claim.slot), slot.label, claim)
        return None

    def _config(self, slot: Slot) -> RunConfig:
        config = slot.config
        return config.tracked(parent_run_id=self.parent_run_id) if self.parent_run_id else config

    def _on_result(self, job: Job, result: Result) -> None:
        assert job.claim is not None
        self.pool.say(f"{job.claim.slot.name}  {self._finish(job.claim, result)}")

    def _finish(self, claim: Claim, result: Result) -> str:
        """Record how an attempt ended; a line that says so."""
        slot = claim.slot
        line = f"{_shown(slot)}{_ending(result)}"
        if result.status in OVER and result.folder is not None:
            self.queue.finish(claim, result.status, result.cause, objective(load_run(result.folder)))
            return line
        self.queue.finish(claim, result.status, result.cause, None)
        if result.status == "interrupted":
            return line
        self._failures[slot.name] += 1 if result.status == "killed" else ATTEMPTS
        self._causes[slot.name] = f"{result.cause}; see {self.pool.log_folder / slot.label}.log"
        return line + ("; waits to be run again" if self._failures[slot.name] < ATTEMPTS else "")

    def _settle_abandoned(self, slots: Sequence[Slot]) -> None:
        """End the attempts of dead workers: with the loss of a run that got to its end, as failed otherwise."""
        for claim in self.queue.abandoned(slots):
            config = claim.slot.config
            if folder := finished_run(config):
                run = load_run(folder)
                self.queue.finish(claim, run.status, run.cause, objective(run))
            elif not being_written(run_folder(config)):
                self.queue.finish(claim, "killed", "its worker is gone", None)


def _shown(slot: Slot) -> str:
    setting = slot.level.setting or {}
    shown = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in setting.items())
    text = ", ".join(shown)
    return f"{text}  " if text else ""


def _ending(result: Result) -> str:
    if result.status == "finished" and result.folder is not None:
        return f"validation loss {load_run(result.folder).metrics['val_loss']:.4f}"
    return f"{result.status}: {result.cause}" if result.cause else result.status
