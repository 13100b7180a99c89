"""Run the slots of a study: take open ones in turn, each in its own process, until none is left."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from muonlab.errors import EnvironmentFault
from muonlab.record import OVER, Run, load_run
from muonlab.record.lease import Held, Watch, held
from muonlab.record.mend import ended
from muonlab.study.patience import Patience
from muonlab.study.pool import Job, Pool, Result
from muonlab.study.queue import SILENT, Claim, Queue
from muonlab.study.slots import Slot
from muonlab.study.standing import Standing, setting_text, standing
from muonlab.train.config import RunConfig
from muonlab.train.run import run_folder

# The loss, in nats, that Optuna's samplers see for a run that diverged before its first step.
WORST_LOSS = 100.0


class Hopeless(Exception):
    """The worker stops, since its patience has run out."""


@dataclass(frozen=True)
class Missing:
    """A slot without a finished run, and why."""

    slot: Slot
    cause: str


def finished_run(config: RunConfig) -> Path | None:
    """The folder of the run with these settings, if the run is over and whole."""
    folder = run_folder(config)
    return folder if ended(folder, config.trainer.max_steps) else None


def objective(run: Run) -> float:
    """The loss, in nats, with which a finished or diverged run counts (see analysis.columns.settled_loss), in sweeps
    and experiments alike."""
    from analysis.columns import settled_loss

    first = float(run.steps["train_loss"].iloc[0]) if len(run.steps) else WORST_LOSS
    return settled_loss(run.metrics.get("val_loss", float("nan")), first, run.status)


class Worker:
    """Takes slots of one study on this machine.

    `parent_run_id`: the MLflow run under which its runs are shown.
    """

    def __init__(self, queue: Queue, pool: Pool, parent_run_id: str | None = None):
        self.queue, self.pool, self.parent_run_id = queue, pool, parent_run_id
        self.patience = Patience(pool.say)
        self._watch = Watch()
        self._unsettled: list[tuple[Claim, Result]] = []
        self._over: dict[str, Path] = {}

    def folder(self, slot: Slot) -> Path | None:
        """The folder of the slot's run, if the run is over."""
        if slot.name not in self._over:
            drawn = self.queue.drawn(slot)
            if drawn is not None and (folder := finished_run(drawn.config)):
                self._over[slot.name] = folder
        return self._over.get(slot.name)

    def run(self, slots: Sequence[Slot], title: str, wait: bool) -> list[Missing]:
        """Run the open slots, and return those still missing.

        A run that several slots share is trained once. A refusal of the machine or a store is not a result: the slot
        waits and is tried again (see Patience). `wait`: stay until other workers, and runs that outlived theirs, have
        finished their slots, and take those over if they die. On Ctrl-C runs save a checkpoint, their slots are open
        again, and KeyboardInterrupt is raised.
        """
        # Of slots that share a run, every worker takes the first, so that nobody trains it twice.
        first = list(
            {slot.name if slot.drawn else run_folder(slot.config): slot for slot in reversed(slots)}.values()
        )[::-1]
        with self.queue.heartbeat, suppress(Hopeless):
            self._run(slots, first, title, wait)
        with suppress(EnvironmentFault):  # the next command records what cannot be recorded now
            self._settle(slots)
        return [
            Missing(slot, self.patience.causes.get(slot.name, "not run yet"))
            for slot in slots
            if self.folder(slot) is None
        ]

    def _run(self, slots: Sequence[Slot], first: Sequence[Slot], title: str, wait: bool) -> None:
        announced = False
        while not self.patience.end:
            try:
                self._settle(slots)
                todo = self._open(first)
                if not todo and not self._unsettled:
                    return
                others = self.others(todo)
                if len(others) < len(todo) and not self.patience.pause:
                    steps = sum(slot.config.trainer.max_steps for slot in todo)
                    stands = partial(self._standing, slots)
                    if self.pool.run(
                        partial(self._next_job, todo), self._on_result, title, len(todo), steps, stands
                    ):
                        continue
                if len(others) == len(todo) and not wait:
                    return
                if len(others) == len(todo) and not announced:
                    self.pool.say(
                        "waiting for " + "; ".join(f"{name} ({who})" for name, who in others.items())
                    )
                    announced = True
            except EnvironmentFault as fault:
                self.patience.fault(str(fault))
            time.sleep(min(1.0, self.patience.pause or self.queue.heartbeat.every))

    def _standing(self, slots: Sequence[Slot]) -> Standing:
        return standing(slots, self.queue.attempts(slots))

    def _open(self, slots: Sequence[Slot]) -> list[Slot]:
        return [slot for slot in slots if not self.patience.given_up(slot.name) and self.folder(slot) is None]

    def others(self, slots: Sequence[Slot]) -> dict[str, str]:
        """The slots that a living worker has, or whose run is still being written though its worker is gone, and by
        whom."""
        busy: dict[str, str] = {}
        taken = self.queue.busy(slots)
        for slot in slots:
            drawn = self.queue.drawn(slot)
            lease = self._lease(drawn) if drawn is not None else None
            if slot.name in taken:
                busy[slot.name] = "another worker has it"
            elif lease is not None:
                busy[slot.name] = (
                    f"{lease.path.parent} is still being written by {lease.owner or 'a process'}"
                )
        return busy

    def _lease(self, slot: Slot) -> Held | None:
        """The lease of the slot's run, if its holder may be alive."""
        lease = held(run_folder(slot.config))
        return lease if lease is not None and lease.alive(self._watch) else None

    # ------------------------------------------------------------------ one run
    def _next_job(self, todo: Sequence[Slot]) -> Job | None:
        if self.patience.pause or self.patience.end:
            return None
        try:
            return self._take(self._open(todo))
        except EnvironmentFault as fault:
            self.patience.fault(str(fault))
            return None

    def _take(self, slots: Sequence[Slot]) -> Job | None:
        others = self.others(slots)
        # Slots that had trouble come last.
        for slot in sorted(slots, key=lambda slot: slot.name in self.patience.causes):
            if slot.name in others or (claim := self.queue.claim(slot)) is None:
                continue
            try:
                folder = finished_run(claim.slot.config)
            except EnvironmentFault as fault:
                self._end(claim, Result("environment", str(fault)))
                return None
            if folder is None:
                return Job(self.config(claim.slot), slot.label, claim)
            self._end(
                claim, Result(load_run(folder).status, folder=folder)
            )  # another worker finished it meanwhile
        return None

    def config(self, slot: Slot) -> RunConfig:
        """The settings of the slot's run, shown under its study in MLflow."""
        config = slot.config
        return config.tracked(parent_run_id=self.parent_run_id) if self.parent_run_id else config

    def _on_result(self, job: Job, result: Result) -> None:
        assert job.claim is not None
        slot = job.claim.slot
        self._end(job.claim, result)
        self._count(slot, result)
        again = result.status not in OVER and not self.patience.given_up(slot.name)
        waits = "; will be run again" if again and result.status != "interrupted" else ""
        self.pool.say(f"{slot.name}  {_shown(slot)}{_ending(result)}{waits}")
        if self.patience.end:
            raise Hopeless

    def _count(self, slot: Slot, result: Result) -> None:
        """Count what a result says about the machine rather than the setting."""
        if result.status in OVER:
            self.patience.well()
        elif result.status == "killed":
            self.patience.killed(slot.name, f"{result.cause}; see {self._log(slot)}")
        elif result.status == "environment":
            self.patience.fault(result.cause, slot.name)
        elif result.status != "interrupted":
            self.patience.failed(slot.name, f"{result.cause}; see {self._log(slot)}", result.cause)

    def _log(self, slot: Slot) -> Path:
        return self.pool.log_folder / f"{slot.label}.log"

    # ------------------------------------------------------------------ the ends of attempts
    def _end(self, claim: Claim, result: Result) -> None:
        """Record in the queue how an attempt ended, or keep it for later if the storage refuses."""
        try:
            self.queue.finish(claim, result.status, result.cause, _loss(result))
        except EnvironmentFault as fault:
            self._unsettled.append((claim, result))
            self.patience.fault(str(fault))

    def _settle(self, slots: Sequence[Slot]) -> None:
        """End attempts whose end could not be recorded, those whose run is over, whoever has them, and those of dead
        workers whose run nobody writes any more."""
        unsettled, self._unsettled = self._unsettled, []
        for claim, result in unsettled:
            self._end(claim, result)
        for claim, alive in self.queue.running(slots):
            if folder := finished_run(claim.slot.config):
                self._end(claim, _outcome(folder))
            elif not alive and self._lease(claim.slot) is None:
                self._end(claim, Result("killed", SILENT))
        for slot in self.queue.uncounted(
            slots
        ):  # a power cut may lose the queue's last lines but keep the run
            if self.folder(slot) and (counted := self.queue.claim(slot)):
                self._end(counted, _outcome(self._over[slot.name]))


def _outcome(folder: Path) -> Result:
    """The result of a run that is over."""
    run = load_run(folder)
    return Result(run.status, run.cause, folder)


def _loss(result: Result) -> float | None:
    """The loss that counts, in nats; None if nothing counts."""
    if result.status not in OVER or result.folder is None:
        return None
    return objective(load_run(result.folder))


def _shown(slot: Slot) -> str:
    text = setting_text(slot.level.setting or {})
    return f"{text}  " if text else ""


def _ending(result: Result) -> str:
    if result.status == "finished" and result.folder is not None:
        return f"validation loss {load_run(result.folder).metrics['val_loss']:.4f}"
    return f"{result.status}: {result.cause}" if result.cause else result.status
