"""The MLflow store: made once, safe for several and for forked processes, quiet, never a place to hang."""

import fcntl
import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from muonlab.errors import MuonlabError

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


def store_uri(uri: str | None, folder: str | Path) -> str:
    """`uri`; else MLflow's own MLFLOW_TRACKING_URI (the place for an address with a password); else the
    SQLite store `mlflow.db` in `folder`."""
    path = str(Path(folder).absolute() / "mlflow.db")
    if quote(path) != path:
        # SQLAlchemy decodes the path, but MLflow makes its parent folder undecoded: without slashes that is the root.
        path = "/" + quote(path[1:], safe="")
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"


def check_uri(uri: str, place: str = "the MLflow store") -> None:
    """Raises MuonlabError for an address that no MLflow store has; `place` is where it was given."""
    if ":" not in uri or _scheme(uri) not in SCHEMES:
        raise MuonlabError(
            f"{place}: MLflow cannot track to '{without_password(uri)}';"
            f" allowed are URIs beginning with {', '.join(SCHEMES)}"
        )


def prepare_store(tracking_uri: str, experiment: str, artifact_root: str | Path) -> str:
    """Make the store and the experiment, unless they exist, and return the experiment's id.

    Call it before workers start, or from all of them: a new SQLite file crashes when several processes
    migrate it at once, so the first one does it under a file lock, and switches it to write-ahead logging, in
    which readers and writers do not wait for each other. Artifacts go to `artifact_root`/<experiment>, except
    under an MLflow server, which keeps them itself. Raises MuonlabError for a store that cannot be used or
    reached.
    """
    check_uri(tracking_uri)
    artifacts = None
    if not _scheme(tracking_uri).startswith(("http", "databricks")):
        artifacts = (Path(artifact_root).absolute() / re.sub(r"[^\w.-]+", "-", experiment)).as_uri()
    with in_one_sentence(tracking_uri), _only_process(tracking_uri):
        client = connect(tracking_uri)
        return _experiment_id(client, experiment, artifacts)


def connect(tracking_uri: str) -> "MlflowClient":
    """A client of the store; imports MLflow (2 to 3 s) on the first call."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # Progress of migrations, and old ways in which MLflow calls its own dependencies: nothing to act on here.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"mlflow\.")
    return MlflowClient(tracking_uri)


@contextmanager
def in_one_sentence(tracking_uri: str) -> Iterator[None]:
    """Turns whatever a store raises (of MLflow, SQLAlchemy, requests, the system) into one sentence."""
    try:
        yield
    except MuonlabError:
        raise
    except Exception as error:
        # The innermost cause has the reason ("Connection refused"); the outer ones tell of retries.
        cause: BaseException = error
        while inner := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__):
            cause = inner
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        if isinstance(cause, ModuleNotFoundError):
            reason = f"its driver, the Python package {cause.name}, is not installed"
        raise MuonlabError(
            f"cannot use the MLflow store {without_password(tracking_uri)}: {reason}"
        ) from error


def without_password(uri: str) -> str:
    """`uri` fit to be shown."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


@contextmanager
def _only_process(tracking_uri: str) -> Iterator[None]:
    path = _sqlite_path(tracking_uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Persists in the file. Set before the first migration, which then waits for the disk less often.
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
        yield


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0]


def _sqlite_path(tracking_uri: str) -> Path | None:
    if _scheme(tracking_uri) != "sqlite":
        return None
    from sqlalchemy import make_url

    database = make_url(tracking_uri).database
    return Path(database) if database and database != ":memory:" else None


def _experiment_id(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None:
        raise MuonlabError(f"the MLflow experiment '{name}' was removed while it was looked up; try again")
    if found.lifecycle_stage != "active":
        raise MuonlabError(f"the MLflow experiment '{name}' was deleted; restore it or choose another name")
    return found.experiment_id
