"""The MLflow store: made once, safe for several and for forked processes, quiet, never a place to hang."""

import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from muonlab.command import tell
from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record.database import (
    make_database,
    only_maker,
    set_aside,
    sqlite_path,
    sqlite_url,
    tables,
    wait_until_free,
    with_driver,
)
from muonlab.settings.address import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")

ENVIRONMENT = {
    # Read at MLflow's import; otherwise it looks up a telemetry host.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow's own: 120 s and 7 retries, so that a server which is gone holds a run for many minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    # A server's client prints two lines at the end of a run.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # No connection outlives its session, so trial processes forked from one that logs cannot share one.
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
}
"""MLflow's settings where they matter to us; the user's environment goes first."""

QUIET = {
    # Progress of migrations, and old ways in which MLflow calls its own dependencies: nothing to act on here.
    "mlflow": logging.WARNING,
    "alembic": logging.WARNING,
    # These print tracebacks and retries of errors that are raised anyway and become one sentence.
    "mlflow.store.db.utils": logging.CRITICAL,
    "urllib3.connectionpool": logging.ERROR,
}

# What PostgreSQL and servers answer to a wrong name or password, which waiting does not fix.
WRONG = re.compile(
    r"password|authentication|role .* does not exist|database .* does not exist|permission denied|40[13]\b"
    r"|not a database|malformed|readonly|read-only|unable to open|Invalid|Could not parse|Can't load plugin",
)


def store_uri(uri: str | None, folder: str | Path) -> str:
    """`uri`; else MLflow's own MLFLOW_TRACKING_URI (the place for an address with a password); else the
    SQLite store `mlflow.db` in `folder`."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(Path(folder) / "mlflow.db")


def check_uri(uri: str, place: str = "the MLflow store") -> None:
    """Raises MuonlabError for an address that MLflow cannot use; `place` names the setting that holds it."""
    if ":" not in uri or _scheme(uri) not in SCHEMES:
        raise MuonlabError(
            f"{place}: MLflow cannot track to '{without_password(uri)}';"
            f" allowed are URIs beginning with {', '.join(SCHEMES)}"
        )


def prepare_store(tracking_uri: str, experiment: str, artifact_root: str | Path) -> str:
    """Make the store and the experiment, unless they exist, and return the experiment's id.

    Call it before workers start, or from all of them: one process makes a new database, and the others wait. An SQLite
    file is filled beside its place and moved into it, so that a kill costs nothing, and uses write-ahead logging, in
    which readers and writers do not wait for each other; a half-made one, left by a kill, is set aside. Artifacts
    go to `artifact_root`/<experiment>, except under an MLflow server, which keeps them itself. Raises MuonlabError for
    an address that is wrong, and EnvironmentFault for a store that cannot be reached or stays locked.
    """
    check_uri(tracking_uri)
    artifacts = None
    if not _scheme(tracking_uri).startswith(("http", "databricks")):
        artifacts = (Path(artifact_root).absolute() / re.sub(r"[^\w.-]+", "-", experiment)).as_uri()
    with in_one_sentence(tracking_uri), only_maker(tracking_uri):
        if (path := sqlite_path(tracking_uri)) is not None:
            _make_file(path, tracking_uri)
        return _experiment_id(connect(tracking_uri), experiment, artifacts)


def connect(tracking_uri: str) -> "MlflowClient":
    """A client of the store; imports MLflow (2 to 3 s) on the first call."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"mlflow\.")
    return MlflowClient(with_driver(tracking_uri))


@contextmanager
def in_one_sentence(tracking_uri: str) -> Iterator[None]:
    """Turns whatever a store raises (of MLflow, SQLAlchemy, requests, the system) into one sentence: an
    EnvironmentFault, or another MuonlabError where the address or the database is wrong."""
    try:
        yield
    except MuonlabError:
        raise
    except Exception as error:
        raise store_fault(f"the MLflow store {without_password(tracking_uri)}", error) from error


def store_fault(store: str, error: BaseException) -> MuonlabError:
    """The error to raise for an exception of a store; `store` names it in the sentence."""
    # The innermost cause has the reason ("Connection refused"); the outer ones only report retries.
    cause = error
    while inner := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__):
        cause = inner
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    reason = without_password(lines[0].strip().removesuffix(":"))
    if isinstance(cause, ModuleNotFoundError):
        return MuonlabError(
            f"cannot use {store}: its driver, the Python package {cause.name}, is not installed"
        )
    if re.search("no password supplied|fe_sendauth", str(cause)):
        return MuonlabError(f"cannot use {store}: {reason}; {PASSWORDS}")
    kind = MuonlabError if WRONG.search(" ".join(lines)) else EnvironmentFault
    return kind(f"cannot use {store}: {reason}")


PASSWORDS = (
    "set the password in $PGPASSWORD or ~/.pgpass, or within the whole address in $MLFLOW_TRACKING_URI for MLflow"
    " and $MUONLAB_STORAGE for the queue"
)


def holds_run(tracking_uri: str, run_id: str) -> bool | None:
    """Whether an SQLite store has a run, without importing MLflow; None for other stores, which only MLflow can ask."""
    path = sqlite_path(tracking_uri)
    if path is None:
        return None
    with in_one_sentence(tracking_uri):
        if "runs" not in tables(path):
            return False
        with closing(sqlite3.connect(path, timeout=20)) as connection:
            query = "SELECT 1 FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active'"
            return connection.execute(query, (run_id,)).fetchone() is not None


def _make_file(path: Path, tracking_uri: str) -> None:
    """Create the database of an SQLite store, replacing one that a kill left half made."""
    wait_until_free(path)
    make_database(path, _migrated)
    try:
        connect(tracking_uri)
    except Exception:
        if not _half_made(path):
            raise
        aside = set_aside(path, "half-made")
        tell(
            f"{path} was left half made by a command that was killed; it is now {aside.name}, and a new one is made"
        )
        make_database(path, _migrated)


def _migrated(new: Path) -> None:
    with closing(sqlite3.connect(new)) as connection:
        # Persists in the file. Set before the first migration, which then waits for the disk less often.
        connection.execute("PRAGMA journal_mode=WAL")
    connect(sqlite_url(new)).search_experiments()


def _half_made(path: Path) -> bool:
    """Whether a database that MLflow refuses has MLflow's tables, and not one run to lose."""
    try:
        made = tables(path)
        if not made & {"experiments", "alembic_version"}:
            return False
        with closing(sqlite3.connect(path)) as connection:
            return "runs" not in made or connection.execute("SELECT 1 FROM runs").fetchone() is None
    except sqlite3.Error:
        return False


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0]


def _experiment_id(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise MuonlabError(f"the MLflow experiment '{name}' was removed while it was looked up; try again")
    if experiment.lifecycle_stage != "active":
        raise MuonlabError(f"the MLflow experiment '{name}' was deleted; restore it or choose another name")
    return experiment.experiment_id
