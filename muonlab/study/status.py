"""python -m muonlab.study.status STUDY_FOLDER [--json]: how far a study is, without taking part in it.

A run's step, loss and max logit are those of its last checkpoint, since its traces are written with it.
"""

import muonlab.begin  # noqa: F401

# isort: split
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError
from muonlab.study.slots import Slot
from muonlab.study.standing import BestRun, Fault, LiveRun, setting_text, standing
from muonlab.study.study import Study, load_study


@dataclass(frozen=True)
class Status:
    """Every slot is one of done, running, waiting and failed. later: conditions that are tuned on runs still missing,
    whose slots are not known yet. failed: the last attempt ended with an error of the run's own; the study's command
    tries it again."""

    study: str
    slots: int
    done: int
    running: int
    waiting: int
    failed: int
    later: tuple[str, ...]
    best: tuple[BestRun, ...]
    live: tuple[LiveRun, ...]
    faults: tuple[Fault, ...]


def main() -> int:
    """Exit code: 0, or 2 for a mistake in the command."""
    parser = argument_parser("muonlab.study.status", __doc__.splitlines()[0].partition(": ")[2])
    parser.add_argument("folder", type=Path, help="the study's folder, such as studies/ablation")
    parser.add_argument("--json", action="store_true", help="as JSON, infinities and NaN as text")
    given = parser.parse_args()
    status = read_status(load_study(given.folder))
    print(as_json(status) if given.json else as_text(status))
    return 0


def read_status(study: Study) -> Status:
    """The state of every slot, as queue and run folders have it now. Raises EnvironmentFault for a storage that cannot
    be reached."""
    from muonlab.study.queue import Queue
    from muonlab.study.repair import known_slots, over_in
    from muonlab.study.storage import open_storage

    queue = Queue(open_storage(study.storage, study.folder), study.name, study.design)
    slots = known_slots(study, queue)
    drawn = {slot.name: each for slot in slots if (each := queue.drawn(slot)) is not None}
    done = {name for name, slot in drawn.items() if over_in(slot) is not None}
    busy = queue.busy(slots) - done
    attempts = queue.attempts(slots)
    last = {attempt.slot: attempt for attempt in attempts}
    failed = {name for name, each in last.items() if each.status == "failed"} - done - busy
    present = {slot.condition for slot in slots}
    stands = standing(slots, attempts)
    return Status(
        study=study.name,
        slots=len(slots),
        done=len(done),
        running=len(busy),
        waiting=len(slots) - len(done) - len(busy) - len(failed),
        failed=len(failed),
        later=tuple(name for name in study.design.conditions if name not in present),
        best=stands.best,
        live=tuple(_live(drawn[name]) for name in drawn if name in busy),
        faults=stands.faults,
    )


def _live(slot: Slot) -> LiveRun:
    from muonlab.record.stream import stream_trace
    from muonlab.train.run import run_folder

    traces = run_folder(slot.config) / "traces"
    step, loss, logit = None, None, None
    try:
        for table in stream_trace(traces, "steps", ("train_loss",)):
            step, loss = table["step"][-1].as_py(), table["train_loss"][-1].as_py()
        if step is not None:
            for table in stream_trace(traces, "max_logits", ("value",), after=step - 1):
                values = [value for value in table["value"].to_pylist() if value is not None]
                logit = max(values, default=None)
    except MuonlabError:  # a torn part, which the run sets aside when it resumes
        pass
    return LiveRun(slot.name, step, slot.config.trainer.max_steps, loss, logit)


def as_json(status: Status) -> str:
    """The status as JSON."""
    return json.dumps(_plain(asdict(status)), indent=2, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_text(status: Status) -> str:
    """The status in lines: the counts, the best of each arm, the runs of now, and the faults by cause."""
    lines = [
        f"{status.study}: {status.done} of {status.slots} runs done, {status.running} running, "
        f"{status.waiting} waiting, {status.failed} failed"
    ]
    if status.later:
        lines.append(f"more runs once these are done: {', '.join(status.later)}")
    for best in status.best:
        setting = setting_text(best.setting)
        lines.append(
            f"best of {best.runs:>3}  {best.arm}: loss {best.loss:.4f} in {best.slot}"
            + (f" ({setting})" if setting else "")
        )
    for run in status.live:
        lines.append(f"running      {run.slot}: {_progress(run)}")
    for fault in status.faults:
        lines.append(
            f"fault        {fault.slot}: {fault.status}" + (f": {fault.cause}" if fault.cause else "")
        )
    return "\n".join(lines)


def _progress(run: LiveRun) -> str:
    if run.step is None:
        return f"no step of {run.steps} in its record yet"
    loss = "" if run.loss is None else f", loss {run.loss:.4f}"
    logit = "" if run.max_logit is None else f", max logit {run.max_logit:.3g}"
    return f"step {run.step + 1} of {run.steps}{loss}{logit}"


if __name__ == "__main__":
    run_command(main)
