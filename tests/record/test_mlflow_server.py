"""An MLflow server that is killed in the middle of a run: one warning, and the next command completes it."""

import os
import socket
import subprocess
import sys
import time
import warnings

import pytest

from muonlab.errors import EnvironmentFault
from muonlab.record import MlflowRun, prepare_store
from muonlab.record.mlflow_link import Link
from muonlab.record.store import connect

ROWS = [{"step": s, "train_loss": 0.1 * s, "lr": float("nan"), "seconds": 0.5 * s} for s in range(60)]


@pytest.fixture
def serve(store, tmp_path):
    """serve() starts a server over the store, on this machine alone; (process, address)."""
    started = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", store]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def start():
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                *flags,
                "--artifacts-destination",
                str(tmp_path / "a"),
            ],
            env={**os.environ, **quiet},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        started.append(process)
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return process, f"http://127.0.0.1:{port}"
            assert process.poll() is None
            time.sleep(0.1)

    yield start
    for process in started:
        if process.poll() is None:
            end(process)


def end(process):
    """Kill a server with its workers."""
    os.killpg(process.pid, 9)
    process.wait()


def test_a_run_outlives_its_server_and_every_point_is_there_once(serve, tmp_path):
    process, uri = serve()
    prepare_store(uri, "served", tmp_path)
    run = MlflowRun.start(uri, "served", "run", {"lr": 0.1}, {}, tmp_path)
    run.log_rows(ROWS[:20])
    run._charted = {}  # as for a process that was killed before it knew that they had arrived
    run.log_rows(ROWS[:20])
    end(process)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for begin in range(20, 60, 10):
            run.log_rows(ROWS[begin : begin + 10])
        run.finish("finished", metrics={"val_loss": 2.0})
    texts = [str(each.message) for each in caught if "MLflow store" in str(each.message)]
    assert len(texts) == 1
    # Refused, or reset where the connection that was kept open is used once more.
    assert "the run continues and is recorded in its folder" in texts[0]
    assert not Link.read(tmp_path).complete
    with pytest.raises(EnvironmentFault, match="refused"):
        prepare_store(uri, "served", tmp_path)

    serve()
    again = MlflowRun.start(uri, "served", "run", {"lr": 0.1}, {}, tmp_path)
    again.log_rows(ROWS)
    again.finish("finished", metrics={"val_loss": 2.0})
    assert again.run_id == run.run_id
    assert Link.read(tmp_path).complete
    client = connect(uri)
    for key, steps in (("loss/train", range(60)), ("optim/lr", range(60)), ("result/val_loss", [59])):
        assert sorted(p.step for p in client.get_metric_history(run.run_id, key)) == list(steps)
    assert client.get_run(run.run_id).info.status == "FINISHED"
