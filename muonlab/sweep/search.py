"""The search of a study on this machine: take waiting trials in turn, run each in its own process, tell Optuna."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from muonlab.record import RunRecord, load_run
from muonlab.sweep.plan import Plan
from muonlab.sweep.pool import Job, Pool, Result
from muonlab.sweep.study import DIVERGED_LOSS, OptimizerStudy, open_storage, open_study
from muonlab.train.config import resolve
from muonlab.train.run import OVER, run_folder
from muonlab.train.tracking import close_mlflow

# A killed trial is run once more, since a kill may come from outside; killed again, it is a failed trial.
ATTEMPTS = 2
Folders = dict[str, list[Path]]


@dataclass(frozen=True)
class TrialJob:
    """What a trial's job carries with it."""

    study: OptimizerStudy
    trial: optuna.Trial


def open_studies(plan: Plan) -> list[OptimizerStudy]:
    """One Optuna study an optimizer, each filled up to the plan's number of trials, orphans put back."""
    plan.save()
    storage = open_storage(plan.search["storage"], plan.folder)
    studies = []
    for name, section in plan.search["optimizers"].items():
        study = open_study(
            storage, plan.name, name, section["space"], plan.search["sampler"], plan.search["seed"]
        )
        study.fill(plan.search["trials"], section["published"], plan.search["sampler"], plan.search["seed"])
        study.adopt_orphans()
        studies.append(study)
    return studies


def remaining(studies: list[OptimizerStudy], trials: int) -> int:
    """Trials that have not ended yet, over all optimizers."""
    return sum(trials - len(study.counted()) for study in studies)


def search(plan: Plan, studies: list[OptimizerStudy], pool: Pool, parent_run_id: str | None) -> None:
    """Run waiting trials until none is left, the optimizers taking turns.

    A trial that diverges is told DIVERGED_LOSS; one that fails is told as failed with its cause; the search goes on. On
    Ctrl-C running trials keep a checkpoint, wait again in the study, and KeyboardInterrupt is raised.
    """
    turn = 0

    def next_job() -> Job | None:
        nonlocal turn
        for offset in range(len(studies)):
            study = studies[(turn + offset) % len(studies)]
            trial = study.take()
            if trial is not None:
                turn += offset + 1
                return _job(plan, study, trial, parent_run_id)
        return None

    def on_result(job: Job, result: Result) -> None:
        line = _tell(job.about, result)
        pool.say(f"{job.label}  {line}")

    left = remaining(studies, plan.search["trials"])
    pool.run(next_job, on_result, "search", left, left * _steps(plan))


def replicate_jobs(
    plan: Plan, studies: list[OptimizerStudy], parent_run_id: str | None
) -> tuple[list[Job], Folders]:
    """The best setting of every optimizer on the fresh seeds: runs still to do, {optimizer: finished folders}."""
    jobs: list[Job] = []
    folders: Folders = {study.optimizer: [] for study in studies}
    for seed in plan.search["replicate_seeds"]:
        for study in studies:
            best = study.best()
            if best is None:
                continue
            tags = {"role": "replicate", "parent_run_id": parent_run_id}
            config = plan.run_config(study.optimizer, best.params, seed, **tags)
            if done := finished_run(config):
                folders[study.optimizer].append(done)
            else:
                jobs.append(Job(config, f"{study.optimizer}-best-s{seed}", study.optimizer))
    return jobs, folders


def replicate(plan: Plan, jobs: list[Job], folders: Folders, pool: Pool) -> None:
    """Run `jobs` and add their folders; a failed one is told and left out."""
    waiting = iter(jobs)

    def on_result(job: Job, result: Result) -> None:
        pool.say(f"{job.label}  {_ending(result)}")
        if result.status in OVER:
            folders[job.about].append(result.folder)

    pool.run(lambda: next(waiting, None), on_result, "fresh seeds", len(jobs), len(jobs) * _steps(plan))
    for paths in folders.values():
        paths.sort()


def finished_run(config: dict[str, Any]) -> Path | None:
    """The folder of the run that this config describes, if it is over."""
    folder = run_folder(resolve(config))
    return folder if folder.exists() and load_run(folder).status in OVER else None


def _steps(plan: Plan) -> int:
    return plan.config["trainer"]["max_steps"]


def _job(plan: Plan, study: OptimizerStudy, trial: optuna.Trial, parent_run_id: str | None) -> Job:
    number = trial.number
    config = plan.run_config(
        study.optimizer,
        trial.params,
        plan.search["seed"],
        trial=f"{study.optimizer}/{number}",
        role="search",
        parent_run_id=parent_run_id,
    )
    trial.set_user_attr("expected_folder", str(run_folder(resolve(config))))
    return Job(config, f"{study.optimizer}-trial{number}", TrialJob(study, trial))


def _tell(about: TrialJob, result: Result) -> str:
    study, trial = about.study, about.trial
    settings = ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items()
    )
    trial.set_user_attr("status", result.status)
    trial.set_user_attr("cause", result.cause)
    if result.folder is not None:
        trial.set_user_attr("folder", str(result.folder))
    if result.status in ("finished", "diverged"):
        loss = load_run(result.folder).metrics["val_loss"] if result.status == "finished" else DIVERGED_LOSS
        study.study.tell(trial, loss)
    elif result.status == "interrupted" or (result.killed and trial.user_attrs["attempt"] < ATTEMPTS):
        study.put_back(trial)
        return f"{settings}  {result.status}: {result.cause}; waits to be run again"
    else:
        study.study.tell(trial, state=TrialState.FAIL)
        if result.killed:
            _close_record(trial, result)
    return f"{settings}  {_ending(result)}"


def _close_record(trial: optuna.Trial, result: Result) -> None:
    """A killed process could not end its own record; the kernel's way out of memory is SIGKILL."""
    folder = Path(trial.user_attrs["expected_folder"])
    if (folder / "config.yaml").exists():
        status = "out-of-memory" if result.killed == signal.SIGKILL else "failed"
        record = RunRecord.reopen(folder)
        record.finish(status, result.cause)
        close_mlflow(load_run(folder).config, record, status, result.cause)


def _ending(result: Result) -> str:
    if result.status == "finished":
        return f"validation loss {load_run(result.folder).metrics['val_loss']:.4f}"
    return f"{result.status}: {result.cause}"
