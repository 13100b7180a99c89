"""python -m muonlab.study.repair STUDY_FOLDER: make a study's queue, run folders and MLflow runs consistent.

Nothing is deleted: torn files are renamed, and the study's own command resumes from what is whole. It is safe to call
twice, and refuses to run while a worker is alive.
"""

import muonlab.begin  # noqa: F401

# isort: split
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from muonlab.command import argument_parser, run_command
from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.study.slots import Slot
from muonlab.study.study import Study, load_study

if TYPE_CHECKING:
    from muonlab.study.queue import Queue

# A record without these cannot be shown; the study's command writes them again.
WHOLE = ("config.yaml", "environment.json", "status.json")


def main() -> int:
    """Exit code: 0 repaired, or nothing to repair; 2 a mistake in the command, or a worker is alive."""
    parser = argument_parser("muonlab.study.repair", __doc__.splitlines()[0].partition(": ")[2])
    parser.add_argument("folder", type=Path, help="the study's folder, such as studies/ablation")
    changes = 0
    for line in repair(load_study(parser.parse_args().folder)):
        print(line, flush=True)
        changes += 1
    if not changes:
        print("nothing to repair")
    return 0


def repair(study: Study) -> Iterator[str]:
    """Repair the journal, the queue, the run folders and their MLflow runs, yielding one line per change.

    Raises EnvironmentFault while a worker is alive, or if a store cannot be reached.
    """
    from muonlab.study.queue import Queue
    from muonlab.study.storage import open_storage

    runs = Path(study.base().paths.runs)
    yield from _end_dead_leases(runs)
    if study.storage is None:
        yield from _mend_journal(study.folder / "journal.log")
    queue = Queue(open_storage(study.storage, study.folder), study.name, study.design)
    slots = known_slots(study, queue)
    if busy := queue.busy(slots):
        raise EnvironmentFault(
            f"a worker is running {sorted(busy)[0]} of {study.name}; stop it before repairing"
        )
    yield from _remove_leftovers(study.folder, runs)
    folders = dict(_folders(queue, slots))
    for folder, slot in folders.items():
        yield from _mend_run(folder, slot)
    yield from _end_attempts(queue, slots)
    yield from _complete_mlflow(study, folders)


def known_slots(study: Study, queue: "Queue") -> Sequence[Slot]:
    """All slots that the study has by now: those of tuned conditions once their searches are done."""
    from muonlab.study.tuning import Trained, levels_by_arm, with_ranges

    slots = study.slots()

    def over(grown: Study) -> Trained | None:
        nonlocal slots
        slots = grown.slots()
        drawn = [queue.drawn(slot) for slot in slots]
        done = [(slot, folder) for slot in drawn if slot is not None and (folder := over_in(slot))]
        return done if len(done) == len(slots) else None

    ranged = with_ranges(study, over) if study.design.tuning_conditions else None
    if ranged is None:
        return slots
    grown, _, found = ranged
    return grown.slots(levels_by_arm(found))


def over_in(slot: Slot) -> Path | None:
    """The folder of a slot's run, if the run is over and whole enough to say so."""
    from muonlab.study.work import finished_run

    try:
        return finished_run(slot.config)
    except EnvironmentFault:
        raise
    except MuonlabError:
        return None


def _folders(queue: "Queue", slots: Sequence[Slot]) -> Iterator[tuple[Path, Slot]]:
    from muonlab.train.run import run_folder

    for slot in slots:
        drawn = queue.drawn(slot)
        if drawn is not None and (folder := run_folder(drawn.config)).is_dir():
            yield folder, drawn


# ---------------------------------------------------------------------- what is repaired
def _end_dead_leases(runs: Path) -> Iterator[str]:
    """Raises EnvironmentFault for a run, of this study or another, that a living process is writing."""
    from muonlab.record.lease import Lease, Watch, held

    watch = Watch()
    for folder in sorted(path for path in runs.glob("*") if path.is_dir()):
        if (lease := held(folder)) is not None:
            Lease.take(folder, watch).release()
            yield f"{folder}: removed {lease.path.name} of a dead process"


def _mend_journal(path: Path) -> Iterator[str]:
    from muonlab.record.database import only_process
    from muonlab.study.journal import TORN, set_damaged_lines_aside

    if path.exists():
        with only_process(path):
            for line in set_damaged_lines_aside(path):
                yield f"{path}: moved a damaged line of {len(line)} bytes to {path.with_suffix(TORN).name}"


def _remove_leftovers(study: Path, runs: Path) -> Iterator[str]:
    from muonlab.record.files import remove_leftovers

    for folder in (study, runs):
        for path in remove_leftovers(folder):
            yield f"removed {path} of a dead process"


def _mend_run(folder: Path, slot: Slot) -> Iterator[str]:
    from muonlab.record.lease import Lease
    from muonlab.record.mend import set_aside_torn
    from muonlab.record.stream import whole_until
    from muonlab.train.checkpoints import latest_checkpoint

    lease = Lease.take(folder)
    try:
        torn = set_aside_torn(folder)
        steps = slot.config.trainer.max_steps
        torn += latest_checkpoint(folder / "checkpoints", whole_until(folder / "traces"), steps)[1]
    finally:
        lease.release()
    for path in torn:
        yield f"{folder}: set aside torn {path.relative_to(folder)}"


def _end_attempts(queue: "Queue", slots: Sequence[Slot]) -> Iterator[str]:
    """End attempts as the study's next command would: with the loss if the run is over, as failed otherwise."""
    from muonlab.record import load_run
    from muonlab.study.work import objective

    for claim, _ in queue.running(slots):  # all of dead workers: no slot is busy
        if folder := over_in(claim.slot):
            run = load_run(folder)
            queue.finish(claim, run.status, run.cause, objective(run))
            yield f"{claim.slot.name}: its worker died after the run ended as {run.status}; it counts now"
        else:
            queue.finish(claim, "killed", "its worker is gone", None)
            yield f"{claim.slot.name}: its worker died; the slot is open again"


def _complete_mlflow(study: Study, folders: dict[Path, Slot]) -> Iterator[str]:
    from muonlab.record.mlflow_link import Link
    from muonlab.train.tracking import end_strays, reconcile_mlflow

    base = study.base()
    if base.tracking.name == "none":
        return
    parent = Link.of(study.folder).run_id
    known = [parent]
    for folder, slot in folders.items():
        config = slot.config.tracked(parent_run_id=parent) if parent else slot.config
        if all((folder / name).exists() for name in WHOLE) and reconcile_mlflow(config, folder):
            yield f"{folder}: completed its MLflow run"
        known.append(Link.of(folder).run_id)
    for run_id in end_strays(base.tracking, Path(base.paths.runs), study.name, known):
        yield f"MLflow run {run_id}: belongs to no folder; ended as KILLED"


if __name__ == "__main__":
    run_command(main)
