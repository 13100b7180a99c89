"""Carry out a study from its first slot to its answers; rerunning it does what remains."""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from muonlab.command import tell
from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record import load_run
from muonlab.study.design import Design
from muonlab.study.pool import Pool, default_workers, remove_dead_sockets
from muonlab.study.queue import Queue
from muonlab.study.slots import Slot, levels_of
from muonlab.study.storage import open_storage
from muonlab.study.study import Study
from muonlab.study.tuning import Best, Trained, levels_by_arm, with_ranges
from muonlab.study.work import Missing, Worker, finished_run
from muonlab.train.config import RunConfig


def train_study(study: Study) -> tuple[Trained, list[Best], Queue]:
    """Train in two stages, tuned conditions last. Returns every run with its folder, the best levels, and the queue.

    Raises what `begin_study` raises; and MuonlabError, after all other runs have ended, if any slot has no
    finished run: no conclusion is drawn from searches of unequal effort.
    """
    worker = open_worker(study, begin_study(study))

    def search(grown: Study) -> Trained:
        if grown is not study:
            print("the best level of an arm is at the edge of its range: every arm gets as many more beyond")
        return _stage(grown, worker, grown.slots(), "search" if study.searches else "runs")

    ranged = with_ranges(study, search)
    assert ranged is not None, "a stage with missing runs raises"
    grown, trained, found = ranged
    if not study.design.tuning_conditions:
        return trained, [], worker.queue
    for best in found:
        print(best)
    slots = grown.slots(levels_by_arm(found))
    return _stage(grown, worker, slots, "fresh seeds" if study.searches else "runs"), found, worker.queue


def begin_study(study: Study) -> Pool:
    """Check a study and save it, so that workers find it. Returns the pool for its runs.

    Raises MuonlabError for a mistake that would stop any run, before the study is saved.
    """
    remove_dead_sockets()
    pool = _pool(study)
    _check_places(study, pool)
    study.save()
    return pool


def help_with(study: Study) -> int:
    """Take open slots of a study that another command started, until none is left. Returns how many have no finished
    run and are not being run by others."""
    from muonlab.train.tracking import study_run_id

    # A study with a run in MLflow may be over, so its run is looked up and not started again.
    worker = open_worker(study, _pool(study), study_run_id(study.folder))
    missing: list[Missing] = []

    def search(grown: Study) -> Trained | None:
        slots = grown.slots()
        missing[:] = worker.run(slots, study.name, wait=bool(study.design.tuning_conditions))
        return None if missing else _trained(worker, slots)

    ranged = with_ranges(study, search)
    if ranged is not None and study.design.tuning_conditions:
        grown, _, found = ranged
        missing = worker.run(grown.slots(levels_by_arm(found)), study.name, wait=False)
    return len(missing) - len(worker.others([each.slot for each in missing]))


def _pool(study: Study) -> Pool:
    return Pool(study.workers or default_workers(study.base().trainer.devices), study.folder / "logs")


def open_worker(study: Study, pool: Pool, parent_run_id: str | None = None) -> Worker:
    """A worker on the study's queue. In MLflow its runs appear under the study's run: `parent_run_id`, or one opened
    here."""
    from muonlab.train.tracking import open_study_run

    queue = Queue(open_storage(study.storage, study.folder), study.name, study.design)
    base = study.base()
    if parent_run_id is not None:
        return Worker(queue, pool, parent_run_id)
    params = {"question": study.design.question, "command": study.command}
    parent = open_study_run(base.tracking, Path(base.paths.runs), study.name, study.folder, params)
    return Worker(queue, pool, parent.run_id if parent else None)


def _check_places(study: Study, pool: Pool) -> None:
    """Raises MuonlabError for a folder, storage or MLflow store that cannot be used, and for anything that a run would
    refuse, before the study is saved."""
    from muonlab.record.database import sqlite_path
    from muonlab.record.store import store_uri
    from muonlab.train.run import check_places
    from muonlab.train.tracking import open_store

    base = study.base()
    check_places(base)
    if study.storage:
        open_storage(study.storage, study.folder)
    runs = Path(base.paths.runs)
    # A server that cannot be reached is reported first; a database file is made only once nothing else is wrong.
    server = sqlite_path(store_uri(base.tracking.uri, runs)) is None
    if server:
        open_store(base.tracking, runs)
    if samples := _samples(study):
        pool.try_out(samples)
    if not server:
        open_store(base.tracking, runs)


def _samples(study: Study) -> dict[str, RunConfig]:
    """One run for everything that differs by more than a searched setting or a seed, by its place in the design; none
    if everything before the tuned conditions is done."""
    design = study.design
    if all(finished_run(slot.config) for slot in study.slots()):
        return {}
    first = {
        condition: {
            name: levels_of(design, condition, name, arm)[0]
            for name, arm in design.arms_of(condition).items()
        }
        for condition in design.tuning_conditions
    }
    samples: dict[str, RunConfig] = {}
    for slot in study.slots(first):
        level = "" if slot.level.setting is not None else str(slot.level)
        samples.setdefault("/".join(filter(None, (slot.condition, slot.arm, level))), slot.config)
    return samples


def close_study(
    study: Study, folder: Path, markdown: str, curves: Mapping[str, Mapping[int, float]], trained: Trained
) -> None:
    """Show the results in MLflow, `markdown` below the question as the description of the study's run, `curves`
    as its charts and what the trained runs read as its datasets, and end that run."""
    from muonlab.train.tracking import open_study_run

    base = study.base()
    parent = open_study_run(base.tracking, Path(base.paths.runs), study.name, study.folder, {})
    if parent is not None:
        parent.note(f"{study.design.question.strip()}\n\n{markdown.strip()}\n")
        for name, points in curves.items():
            parent.log_curve(name, points)
        read = [load_run(record).environment.data for _, record in trained]
        for name, digest in sorted({(str(data["name"]), str(data["digest"])) for data in read}):
            parent.log_dataset(name, digest)
        parent.log_folder(folder)
        parent.finish("finished")


def ui_command(study: Study) -> str | None:
    """The command that shows the study's runs in a browser; None if they are in no store."""
    from muonlab.record.store import store_uri, without_password

    base = study.base()
    if base.tracking.name == "none":
        return None
    uri = without_password(store_uri(base.tracking.uri, base.paths.runs))
    return f"{os.path.relpath(sys.executable)} -m mlflow ui --backend-store-uri {uri}"


def draw_figures(design: Design, folder: Path) -> list[Path]:
    """Draw the design's figures from the tables in `folder`."""
    from analysis.redraw import redraw

    return redraw(folder) if design.figures else []


def _stage(study: Study, worker: Worker, slots: Sequence[Slot], title: str) -> Trained:
    done = sum(worker.folder(slot) is not None for slot in slots)
    print(f"{done} of {len(slots)} runs done", flush=True)
    missing = worker.run(slots, title, wait=True)
    _complete_mlflow(worker, slots)
    if missing:
        raise MuonlabError(missing_text(missing, len(slots), worker.patience.end))
    return _trained(worker, slots)


def _complete_mlflow(worker: Worker, slots: Sequence[Slot]) -> None:
    """Add what the MLflow store lacks of runs that are over, since it was out of reach or their process was killed."""
    from muonlab.train.tracking import reconcile_mlflow

    try:
        for slot, folder in _trained(worker, slots):
            reconcile_mlflow(worker.config(slot), folder)
    except EnvironmentFault as fault:
        tell(f"MLflow does not show every run yet; rerun the same command to complete it: {fault}")


def _trained(worker: Worker, slots: Sequence[Slot]) -> Trained:
    folders = [(slot, worker.queue.drawn(slot), worker.folder(slot)) for slot in slots]
    return [(drawn, folder) for _, drawn, folder in folders if drawn is not None and folder is not None]


def missing_text(missing: Sequence[Missing], total: int, why: str) -> str:
    """The closing sentence of a study with missing runs: how many, why trying stopped ("": it did not), each cause
    once."""
    causes = Counter(each.cause for each in missing)
    first = {each.cause: each.slot.name for each in reversed(missing)}
    shown = "; ".join(
        f"{first[cause]}{f' and {count - 1} more' if count > 1 else ''}: {cause}"
        for cause, count in causes.items()
    )
    return (
        f"{len(missing)} of {total} runs are missing, so there are no conclusions{f' ({why})' if why else ''};"
        f" rerun the same command to try them again: {shown}"
    )
