"""Carry out a study from its first slot to its answers; rerunning it does what is left."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from muonlab.errors import MuonlabError
from muonlab.study.design import Design
from muonlab.study.pool import Pool, default_workers
from muonlab.study.queue import Queue
from muonlab.study.slots import Slot
from muonlab.study.storage import open_storage
from muonlab.study.study import Study
from muonlab.study.tuning import Best, Trained, best_levels, chosen_levels
from muonlab.study.work import Missing, Worker


def train_study(study: Study) -> tuple[Trained, list[Best], Queue]:
    """Train in two stages, the tuned conditions last; every run with its folder, and what the searches chose.

    Raises MuonlabError, after all other runs ended, for slots that are missing: no conclusion is drawn from searches of
    unequal effort.
    """
    _check_places(study)
    study.save()
    worker = open_worker(study)
    trained = _stage(study, worker, study.slots(), "search" if study.searches else "runs")
    if not study.design.tuning_conditions:
        return trained, [], worker.queue
    found = best_levels(trained, study.design)
    for best in found:
        print(best)
    slots = study.slots(chosen_levels(found))
    return _stage(study, worker, slots, "fresh seeds" if study.searches else "runs"), found, worker.queue


def help_with(study: Study) -> int:
    """Take open slots of a study that another command began, until none is left; how many are still missing."""
    worker = open_worker(study)
    slots = study.slots()
    missing = worker.run(slots, study.name, wait=bool(study.design.tuning_conditions))
    if missing or not study.design.tuning_conditions:
        return len(missing)
    found = best_levels(_trained(worker, slots), study.design)
    return len(worker.run(study.slots(chosen_levels(found)), study.name, wait=False))


def open_worker(study: Study) -> Worker:
    """A worker of this machine on the study's queue; its runs are shown under the study in MLflow."""
    from muonlab.train.tracking import open_study_run

    queue = Queue(open_storage(study.storage, study.folder), study.name, study.design)
    base = study.base()
    params = {"question": study.design.question, "command": study.command}
    parent = open_study_run(base.tracking, Path(base.paths.runs), study.name, study.folder, params)
    pool = Pool(study.workers or default_workers(), study.folder / "logs")
    return Worker(queue, pool, parent.run_id if parent else None)


def _check_places(study: Study) -> None:
    """Raises MuonlabError for a folder, storage or MLflow store that cannot be used, before there is a study."""
    from muonlab.train.run import check_places
    from muonlab.train.tracking import open_store

    base = study.base()
    check_places(base)
    if study.storage:
        open_storage(study.storage, study.folder)
    open_store(base.tracking, Path(base.paths.runs))


def close_study(study: Study, folder: Path) -> None:
    """Show the results in MLflow, and end the study's run there."""
    from muonlab.train.tracking import open_study_run

    base = study.base()
    parent = open_study_run(base.tracking, Path(base.paths.runs), study.name, study.folder, {})
    if parent is not None:
        parent.log_folder(folder)
        parent.finish("finished")


def ui_command(study: Study) -> str | None:
    """The command that shows the study's runs in a browser; None where they are in no store."""
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
    if missing := worker.run(slots, title, wait=True):
        raise MuonlabError(_missing(missing))
    return _trained(worker, slots)


def _trained(worker: Worker, slots: Sequence[Slot]) -> Trained:
    folders = [(slot, worker.queue.drawn(slot), worker.folder(slot)) for slot in slots]
    return [(drawn, folder) for _, drawn, folder in folders if drawn is not None and folder is not None]


def _missing(missing: Sequence[Missing]) -> str:
    causes = "; ".join(f"{each.slot.name} ({each.cause})" for each in missing)
    return f"{len(missing)} runs failed, so nothing is concluded; rerun the same command to try them again: {causes}"
