"""python -m muonlab.ui [STUDY_FOLDER] [--runs FOLDER] [--port N]: browse all runs in MLflow, or a study's trials.

With a study's folder it is optuna-dashboard that shows the study's queue. Both listen on this machine only. Where the
port is taken, the next free one is used.
"""

import muonlab.begin  # noqa: F401

# isort: split
import os
import socket
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, urlencode

from muonlab.command import argument_parser, run_command, tell
from muonlab.errors import MuonlabError
from muonlab.settings.check import check

HOST = "127.0.0.1"
PORTS = 100  # that are tried


def main() -> int:
    """Serve until it is stopped. Exit code: 2 for a mistake in the command, or where no port is free."""
    parser = argument_parser("muonlab.ui", __doc__.splitlines()[0].partition(": ")[2])
    parser.add_argument("study", type=Path, nargs="?", help="a study's folder, such as studies/ablation")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where mlflow.db is (default: runs)")
    parser.add_argument("--port", type=int, default=5000, help="the first to try (default: 5000)")
    given = parser.parse_args()
    if given.study is not None:
        return show_study(given.study, given.port)
    database = given.runs.absolute() / "mlflow.db"
    if not database.exists():
        raise MuonlabError(f"there are no runs to show: {database} does not exist")
    port = free_port(given.port)
    if (page := charts_page(database)) is not None:
        print(f"the charts of the newest study: http://{HOST}:{port}/{page}", flush=True)
    command = ["-m", "mlflow", "ui", "--host", HOST, "--port", str(port), "--workers", "1"]
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    os.execv(sys.executable, [sys.executable, *command, "--backend-store-uri", f"sqlite:///{database}"])


def charts_page(database: Path) -> str | None:
    """The page of MLflow with the charts of the newest study; None where there is no study.

    The address itself asks for model training: MLflow 3.17 shows what the browser chose last, at first its pages for
    GenAI, and reads no tag of the experiment.
    """
    query = (
        "SELECT runs.experiment_id, study.value FROM runs"
        " JOIN tags AS role ON role.run_uuid = runs.run_uuid AND role.key = 'role' AND role.value = 'study'"
        " JOIN tags AS study ON study.run_uuid = runs.run_uuid AND study.key = 'study'"
        " WHERE runs.lifecycle_stage = 'active' ORDER BY runs.start_time DESC LIMIT 1"
    )
    with closing(sqlite3.connect(database, timeout=20)) as connection:
        try:
            newest = connection.execute(query).fetchone()
        except sqlite3.DatabaseError:  # MLflow itself says what is wrong with it
            return None
    if newest is None:
        return None
    experiment, study = newest
    search = urlencode(
        {
            "workflowType": "machine_learning",
            "compareRunsMode": "CHART",
            "searchFilter": f"tags.study = '{study}'",
        },
        quote_via=quote,
    )
    return f"#/experiments/{experiment}/runs?{search}"


def show_study(folder: Path, first: int) -> int:
    """Serve optuna-dashboard on a study's queue; raises MuonlabError where it is not installed."""
    from muonlab.study.storage import open_storage
    from muonlab.study.study import load_study

    study = load_study(folder)
    try:
        from optuna_dashboard import run_server
    except ImportError:
        raise MuonlabError("optuna-dashboard is not installed: pip install 'muonlab[search]'") from None
    port = free_port(first)
    print(f"the trials of {study.name}: http://{HOST}:{port}/dashboard", flush=True)
    run_server(open_storage(study.storage, study.folder), host=HOST, port=port)
    return 0


def free_port(first: int) -> int:
    """The first port from `first` on that nobody on this machine listens at; says so where it is another one.

    Raises MuonlabError for a number that is no port, and where PORTS of them are taken.
    """
    check(int, first, "--port")
    if not 0 < first < 1 << 16:
        raise MuonlabError(f"--port must be at least 1 and at most 65,535, not {first}")
    for port in range(first, min(first + PORTS, 1 << 16)):
        with socket.socket() as tried:
            tried.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # a server that has just ended is no hindrance
            try:
                tried.bind((HOST, port))
            except OSError:
                continue
        if port != first:
            tell(f"port {first} is taken; the next free one is {port}")
        return port
    raise MuonlabError(f"no port from {first} on is free; choose another one with --port")


if __name__ == "__main__":
    run_command(main)
