"""Opens the MLflow run of a record, and completes MLflow runs that fell behind their records."""

import getpass
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record.charts import chart_parts
from muonlab.record.database import only_process
from muonlab.record.environment import Environment, collect_environment
from muonlab.record.load import load_run
from muonlab.record.mlflow_link import FILE, Link
from muonlab.record.mlflow_run import MlflowRun
from muonlab.record.state import read_state, writer_alive
from muonlab.record.store import connect, holds_run, in_one_sentence, prepare_store, store_uri
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
    """The parent run of a study: the same one for every process and at every call."""
    store = open_store(tracking, runs)
    if store is None:
        return None
    with only_process(folder / FILE):
        tags = {"study": name, "role": "study", **_origin(collect_environment())}
        return MlflowRun.start(*store, name, params, tags, folder)


def study_run_id(folder: Path) -> str | None:
    """The id of the MLflow run of the study in `folder`; None where it has none, or its mlflow.json is torn."""
    try:
        link = Link.read(folder)
    except EnvironmentFault:
        raise
    except MuonlabError:
        return None
    return link.run_id if link else None


def open_mlflow(
    store: tuple[str, str], config: RunConfig, folder: Path, environment: Environment
) -> MlflowRun:
    """The MLflow run of the record in `folder`, in the store that `open_store` returned, created or continued.

    The tags repeat what nesting shows (study, trial, role, seed), since a table sorted by a metric has no nesting.
    Raises EnvironmentFault for a store that cannot be reached.
    """
    tracking = config.tracking
    values: Mapping[str, object] = config.as_dict()
    tags = {
        "optimizer": config.optimizer.name,
        "model": config.model.name,
        "seed": config.seed,
        "folder": folder.absolute(),
        **_origin(environment),
        "dirty": environment.dirty,
        "host": environment.host,
        "device": ", ".join(environment.accelerators) or environment.cpu,
        "study": tracking.study,
        "trial": tracking.trial,
        "role": tracking.role,
    }
    run = MlflowRun.start(
        *store,
        shown_name(config),
        {key: values[key] for key in PARAMETERS},
        {key: str(value) for key, value in tags.items() if value is not None},
        folder,
        parent_run_id=tracking.parent_run_id,
    )
    run.log_dataset(str(environment.data["name"]), str(environment.data["digest"]))
    return run


def shown_name(config: RunConfig) -> str:
    """The name of a run in MLflow's tables: its own, or in a study that of its slot, since arms may share every setting
    that a run's own name has, and the learning rate, which a slot drawn by a sampler does not name."""
    lr = getattr(config.optimizer, "lr", None)
    if config.tracking.trial is None:
        return config.name
    return f"{config.tracking.trial} lr={lr:.4g}" if isinstance(lr, int | float) else config.tracking.trial


def _origin(environment: Environment) -> dict[str, str | None]:
    """What fills MLflow's columns Source, User and Version, by the tags that its own fluent interface sets."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        user = None
    return {
        "mlflow.source.name": environment.command,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": environment.commit,
        "mlflow.user": user,
    }


def reconcile_mlflow(config: RunConfig, folder: Path) -> bool:
    """Complete the MLflow run of a record that no process writes any more: its points, files and end, from the record.

    For a run whose store failed or was lost, or whose process was killed. Returns whether anything was missing, which
    costs next to nothing where mlflow.json says that MLflow is complete. Raises MuonlabError as `open_store` does, and
    for a record that cannot be read.
    """
    if config.tracking.name == "none" or not (folder / "config.yaml").exists() or shown_whole(config, folder):
        return False
    if writer_alive(folder) is not False:
        return False
    run = load_run(folder)
    store = open_store(config.tracking, Path(config.paths.runs))
    assert store is not None
    mlflow_run = open_mlflow(store, config, folder, run.environment)
    for rows in _settled_rows(folder, after=mlflow_run.first_step - 1):
        mlflow_run.log_rows(rows)
    mlflow_run.log_folder(folder)
    mlflow_run.finish(run.status, run.cause, run.metrics)
    return True


def end_strays(tracking: TrackingSettings, runs: Path, study: str, known: Sequence[str | None]) -> list[str]:
    """End the runs of a study that MLflow shows as running but no folder has any more, and return their ids."""
    store = open_store(tracking, runs)
    if store is None:
        return []
    with in_one_sentence(store[0]):
        client = connect(store[0])
        place = client.get_experiment_by_name(store[1])
        assert place is not None
        query = f"tags.study = '{study}' AND attributes.status = 'RUNNING'"
        running = client.search_runs([place.experiment_id], query)
        strays = [run.info.run_id for run in running if run.info.run_id not in known]
        for run_id in strays:
            client.set_terminated(run_id, "KILLED")
    return strays


def shown_whole(config: RunConfig, folder: Path) -> bool:
    """Whether mlflow.json says that MLflow has everything, and an SQLite store still has the run."""
    try:
        link = Link.read(folder)
    except EnvironmentFault:
        raise
    except MuonlabError:  # damaged: it is found again when it is opened
        return False
    if link is None or link.run_id is None or not link.complete:
        return False
    return holds_run(store_uri(config.tracking.uri, config.paths.runs), link.run_id) is not False


def _settled_rows(folder: Path, after: int) -> Iterator[list[dict[str, float]]]:
    """The rows after a step that will not be computed again: all rows of a record that has ended; of a killed run those
    before its last checkpoint."""
    state = read_state(folder)
    killed = state is None or state["status"] == "running"
    steps = [path.stem.partition("-")[2] for path in (folder / "checkpoints").glob("step-*.ckpt")]
    end = max((int(step) for step in steps if step.isdecimal()), default=0) if killed else math.inf
    for rows in chart_parts(folder / "traces", after):
        yield [row for row in rows if row["step"] < end]
