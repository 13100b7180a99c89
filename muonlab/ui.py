"""python -m muonlab.ui [STUDY_FOLDER] [--runs FOLDER] [--port N]: browse all runs in MLflow, or a study's trials.

With a study's folder it is optuna-dashboard that shows the study's queue. Both listen on this machine only. Where the
port is taken, the next free one is used.
"""

import muonlab.begin  # noqa: F401

# isort: split
import os
import socket
import sys
from pathlib import Path

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
    command = ["-m", "mlflow", "ui", "--host", HOST, "--port", str(free_port(given.port)), "--workers", "1"]
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    os.execv(sys.executable, [sys.executable, *command, "--backend-store-uri", f"sqlite:///{database}"])


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
