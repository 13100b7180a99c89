"""Opens the MLflow run that shows a record."""

from collections.abc import Mapping
from pathlib import Path

from muonlab.record import RunRecord
from muonlab.record.environment import Environment
from muonlab.record.mlflow_run import MlflowRun
from muonlab.record.store import prepare_store, store_uri
from muonlab.train.config import RunConfig, TrackingSettings

# Sections that say how a run is computed; where it is kept is not a parameter.
PARAMETERS = ("model", "optimizer", "schedule", "data", "trainer", "seed")


def open_store(tracking: TrackingSettings, runs: Path) -> tuple[str, str] | None:
    """(uri, experiment) of the store that `tracking` names, made beside `runs` if need be; None for `none`."""
    if tracking.name == "none":
        return None
    uri = store_uri(tracking.uri, runs)
    prepare_store(uri, tracking.experiment, runs / "mlartifacts")
    return uri, tracking.experiment


def open_study_run(
    tracking: TrackingSettings, runs: Path, name: str, folder: Path, params: Mapping[str, object]
) -> MlflowRun | None:
    """The parent run of a study, the same one every time: its id is kept in the study's folder."""
    store = open_store(tracking, runs)
    if store is None:
        return None
    kept, tags = folder / "mlflow_run_id", {"study": name, "role": "study"}
    run_id = kept.read_text() if kept.exists() else None
    run = MlflowRun.start(*store, name, params, tags, run_id=run_id)
    if run_id is not None:
        kept.write_text(run.run_id)
        return run
    try:
        with kept.open("x") as file:
            file.write(run.run_id)
    except FileExistsError:  # another process opened the study in the same moment
        run.discard()
        return MlflowRun.start(*store, name, params, tags, run_id=kept.read_text())
    return run


def open_mlflow(
    store: tuple[str, str], config: RunConfig, record: RunRecord, environment: Environment
) -> MlflowRun:
    """The MLflow run of a record in the store that `open_store` gave, begun or gone on with.

    The tags repeat what nesting shows (study, trial, role, seed), since a table sorted by a metric has no nesting.
    Raises MuonlabError for a tracking server that cannot be used.
    """
    tracking, values = config.tracking, config.as_dict()
    tags = {
        "optimizer": config.optimizer.name,
        "model": config.model.name,
        "seed": config.seed,
        "folder": record.folder.absolute(),
        "mlflow.source.git.commit": environment.commit,
        "dirty": environment.dirty,
        "host": environment.host,
        "device": ", ".join(environment.accelerators) or environment.cpu,
        "study": tracking.study,
        "trial": tracking.trial,
        "role": tracking.role,
    }
    run = MlflowRun.start(
        *store,
        config.name,
        {key: values[key] for key in PARAMETERS},
        {key: str(value) for key, value in tags.items() if value is not None},
        parent_run_id=tracking.parent_run_id,
        run_id=record.mlflow_run_id,
    )
    record.mlflow_run_id = run.run_id
    run.log_dataset(str(environment.data["name"]), str(environment.data["digest"]))
    return run


def close_mlflow(config: RunConfig, record: RunRecord, status: str, cause: str) -> None:
    """End the MLflow run of a record whose own process was killed."""
    store = open_store(config.tracking, Path(config.paths.runs))
    if store is not None and record.mlflow_run_id is not None:
        run = MlflowRun.start(*store, config.name, {}, {}, run_id=record.mlflow_run_id)
        for rows in record.rows():
            run.log_rows(rows)
        run.finish(status, cause)
