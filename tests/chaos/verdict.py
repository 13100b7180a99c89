"""What must hold when a study is done, whatever was done to it: the same as in its undisturbed twin."""

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from chaos.study import Places, Plan
from muonlab.record import load_run
from muonlab.record.load import Run

CATEGORIES = ("failed for good", "lost", "doubled", "different", "left behind", "traceback")
SECONDS = "progress/seconds"
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Violation:
    """kind: one of CATEGORIES."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def judge(places: Places, twin: Places, plan: Plan) -> list[Violation]:
    """Everything that is wrong with a study that is done."""
    checks = (
        partial(_attempts, places, twin, plan),
        partial(_records, places, twin, plan),
        partial(_tracking, places, twin, plan),
        partial(_leftovers, places, twin),
        partial(tracebacks, places),
    )
    violations: list[Violation] = []
    for check in checks:
        try:
            violations += check()
        except Exception as error:  # what cannot be read is lost, and the other checks go on
            violations.append(Violation("lost", f"{check.func.__name__}: {type(error).__name__}: {error}"))
    return violations


def diverged(twin: Places) -> int:
    """How many settings of the study diverge."""
    return sum(load_run(folder).status == "diverged" for folder in _run_folders(twin).values())


# ---------------------------------------------------------------------- the queue
def _attempts(places: Places, twin: Places, plan: Plan) -> Iterator[Violation]:
    """Every slot has one complete attempt, with its twin's loss."""
    own, other = _complete(places), _complete(twin)
    if len(other) != plan.slots:
        yield Violation("lost", f"the twin itself has {len(other)} slots, not {plan.slots}")
    for slot in sorted(own.keys() | other.keys()):
        losses = own.get(slot, [])
        if len(losses) != 1:
            kind = "doubled" if losses else "lost"
            yield Violation(kind, f"slot {slot} has {len(losses)} complete attempts")
        elif slot not in other:
            yield Violation("different", f"slot {slot} is not in the twin")
        elif losses != other[slot]:
            yield Violation(
                "different", f"slot {slot} counts with {losses[0]}, its twin's with {other[slot][0]}"
            )


def _complete(places: Places) -> dict[str, list[float]]:
    if places.queue.exists():
        storage = optuna.storages.get_storage(f"sqlite:///{places.queue}")
    else:
        storage = JournalStorage(JournalFileBackend(str(places.study / "journal.log")))
    losses: dict[str, list[float]] = {}
    for study in optuna.get_all_study_names(storage):
        for trial in optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False):
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                losses.setdefault(trial.user_attrs["slot"], []).append(trial.value)
            elif trial.state == TrialState.RUNNING:
                losses.setdefault(trial.user_attrs.get("slot", "?") + " (still running)", [])
    return losses


# ---------------------------------------------------------------------- the records
def _records(places: Places, twin: Places, plan: Plan) -> Iterator[Violation]:
    """Every run has one record, which equals its twin's to the bit."""
    own, other = _run_folders(places), _run_folders(twin)
    for name in sorted(other.keys() - own.keys()):
        yield Violation("lost", f"run {name} has no record")
    for name in sorted(own.keys() - other.keys()):
        yield Violation("doubled", f"run {name} is not in the twin")
    for name in sorted(own.keys() & other.keys()):
        run, same = load_run(own[name]), load_run(other[name])
        if run.status != same.status:
            yield Violation("lost", f"run {name} is {run.status} ({run.cause}), its twin {same.status}")
            continue
        for what, mine, theirs in _contents(run, same):
            if mine != theirs:
                yield Violation("different", f"{what} of run {name}, {run.status}")


def _run_folders(places: Places) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in places.runs.glob("[!.]*/config.yaml")}


def _contents(run: Run, same: Run) -> Iterator[tuple[str, Any, Any]]:
    """(what, of this run, of the other) to be compared; bits where there are floats."""
    yield "cause", run.cause, same.cause
    yield "final metrics", _bits(run.metrics), _bits(same.metrics)
    for trace in ("steps", "max_logits", "experts"):
        mine, theirs = getattr(run, trace), getattr(same, trace)
        yield f"columns of {trace}", list(mine.columns), list(theirs.columns)
        for column in mine.columns.intersection(theirs.columns):
            if column != "seconds":
                yield (
                    f"{trace}.{column}",
                    mine[column].to_numpy().tobytes(),
                    theirs[column].to_numpy().tobytes(),
                )
    yield "events", (run.folder / "events.json").read_text(), (same.folder / "events.json").read_text()
    if run.status == "finished":
        yield "weights", _weights(run.folder), _weights(same.folder)


def _bits(metrics: dict[str, float]) -> dict[str, bytes]:
    return {name: np.float64(value).tobytes() for name, value in metrics.items()}


def _weights(folder: Path) -> dict[str, bytes]:
    newest = max((folder / "checkpoints").glob("step-*.ckpt"))
    state = torch.load(newest, map_location="cpu", weights_only=True)["state_dict"]
    return {key: value.contiguous().view(torch.uint8).numpy().tobytes() for key, value in state.items()}


# ---------------------------------------------------------------------- MLflow
def _tracking(places: Places, twin: Places, plan: Plan) -> Iterator[Violation]:
    """Every slot has one MLflow run, and the study one; all are over, with every point of the twin's once."""
    own, other = _shown(places.tracking), _shown(twin.tracking)
    for slot in sorted(own.keys() | other.keys()):
        runs = own.get(slot, [])
        if len(runs) != 1:
            kind = "doubled" if runs else "lost"
            yield Violation(kind, f"{slot} has {len(runs)} MLflow runs: {[status for status, _ in runs]}")
            continue
        [(status, points)], [(_, wanted)] = runs, other.get(slot, [("", Counter())])
        if status != "FINISHED":
            yield Violation("lost", f"the MLflow run of {slot} is {status}")
        steps = Counter((key, step) for key, step, *_ in points.elements())
        if twice := [place for place, count in steps.items() if count > 1]:
            yield Violation("doubled", f"{len(twice)} points of {slot} in MLflow, such as {twice[0]}")
        for lost, sentence in ((wanted - points, "lacks"), (points - wanted, "has beyond its twin's")):
            if lost:
                category = "lost" if sentence == "lacks" else "different"
                yield Violation(
                    category, f"{slot} in MLflow {sentence} {len(lost)} points, such as {min(lost)}"
                )


def _shown(path: Path) -> dict[str, list[tuple[str, Counter[tuple[Any, ...]]]]]:
    """{slot, or "the study": [(status, {(key, step, value, not a number): how often}) of each MLflow run]}; of
    seconds, which differ, only the steps."""
    shown: dict[str, list[tuple[str, Counter[tuple[Any, ...]]]]] = {}
    connection = sqlite3.connect(path)
    for run, status in connection.execute(
        "SELECT run_uuid, status FROM runs WHERE lifecycle_stage = 'active'"
    ):
        tags = dict(connection.execute("SELECT key, value FROM tags WHERE run_uuid = ?", [run]).fetchall())
        points = connection.execute("SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ?", [run])
        counted = Counter(
            (key, step, 0.0 if key == SECONDS else value, nan) for key, step, value, nan in points
        )
        name = tags.get("trial") or ("the study" if tags.get("role") == "study" else f"run {run}")
        shown.setdefault(name, []).append((status, counted))
    connection.close()
    return shown


# ---------------------------------------------------------------------- what is left behind
def _leftovers(places: Places, twin: Places) -> Iterator[Violation]:
    """No temporary file, no lease, no checkpoint that nobody needs."""
    for pattern in ("**/*.new", "**/*.tmp", "**/lease-*"):
        for path in places.disk.glob(pattern):
            yield Violation("left behind", str(path.relative_to(places.disk)))
    usual = {path.name for path in twin.temporary.iterdir()}  # torch keeps a folder there
    for path in places.temporary.iterdir():
        if path.name not in usual:
            yield Violation("left behind", f"{path.name} in the folder for temporary files")
    for folder in places.runs.glob("[!.]*/checkpoints"):
        if len(kept := sorted(path.name for path in folder.glob("*.ckpt"))) > 2:
            yield Violation("left behind", f"checkpoints of {folder.parent.name}: {', '.join(kept)}")


def tracebacks(places: Places) -> Iterator[Violation]:
    """No command and no run's log shows one; what a server prints is not ours. Each kind once, with its first place."""
    logs = [path for path in places.output.glob("*.log") if path.name != "server.log"]
    kinds: dict[str, list[str]] = {}
    for path in sorted([*logs, *places.study.glob("logs/*.log")]):
        for text in path.read_text(errors="replace").split(TRACEBACK)[1:]:
            lines = text.splitlines()[1:]
            error = next((line for line in lines if line[:1].strip()), "")
            ours = re.findall(r'File "[^"]*/((?:muonlab|analysis)/[^"]+)", line (\d+)', text)
            kinds.setdefault(f"{error[:200]} ({':'.join(ours[-1]) if ours else 'elsewhere'})", []).append(
                path.name
            )
    for kind, names in kinds.items():
        yield Violation("traceback", f"{kind}, {len(names)} times, first in {names[0]}")
