"""Studies and MLflow in PostgreSQL: two workers give one worker's records, and nobody writes the password down."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from postgres import PASSWORD
from tiny_designs import search

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record import MlflowRun, load_run, prepare_store
from muonlab.record.store import connect
from muonlab.settings.address import storage_address
from muonlab.study.queue import Queue
from muonlab.study.run import train_study
from muonlab.study.storage import open_storage
from muonlab.train.run import run_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_password(monkeypatch):
    for name in ("PGPASSWORD", "PGPASSFILE", "MUONLAB_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def worker(folder):
    """A worker process on a study; what it printed."""
    command = [sys.executable, "-m", "muonlab.worker", str(folder), "--workers", "1"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=dict(os.environ)
    )


@pytest.mark.usefixtures("no_password")
def test_two_workers_give_one_workers_records_and_no_password_is_written(
    postgres, study, tmp_path, monkeypatch, capfd
):
    plan = {"search": {"search": search(trials=2), "seeds": [0]}}
    train_study(study(plan))
    alone = {slot.name: load_run(run_folder(slot.config)) for slot in study(plan).slots()}

    monkeypatch.setenv("MUONLAB_STORAGE", postgres.create("queue"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres.create("mlflow"))
    shared = [f"paths.runs={tmp_path / 'shared'}", "tracking=mlflow"]
    made = study(plan, overrides=shared, name="shared", storage=storage_address(None))
    made.save()
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(worker, [made.folder] * 2))
    # 3: the other one had the last slot still.
    assert {process.returncode for process in done} <= {0, 3}, [process.stderr for process in done]

    slots = made.slots()
    for slot in slots:
        run, other = load_run(run_folder(slot.config)), alone[slot.name]
        assert run.status == "finished"
        assert run.metrics == other.metrics
        assert run.steps.drop(columns="seconds").equals(other.steps.drop(columns="seconds"))
    attempts = Queue(open_storage(made.storage, made.folder), made.name, made.design).attempts(slots)
    assert [(a.slot, a.state) for a in attempts] == [(slot.name, "COMPLETE") for slot in slots]

    client = connect(os.environ["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("muonlab").experiment_id])
    assert len(runs) == 3  # of two slots and of the study
    for run in runs:
        points = client.get_metric_history(run.info.run_id, "loss/train")
        assert len(points) == (0 if run.data.tags["role"] == "study" else 40)

    train_study(made)  # the first command's own output, too
    printed = [*capfd.readouterr(), *(text for each in done for text in (each.stdout, each.stderr))]
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    shown = [str((run.data.params, run.data.tags)) for run in runs]
    assert kept
    for text in [*kept, *(text.encode() for text in printed + shown)]:
        assert PASSWORD.encode() not in text


@pytest.mark.usefixtures("no_password")
def test_points_that_are_sent_twice_are_kept_once(postgres, tmp_path):
    uri = postgres.create("points")
    with ThreadPoolExecutor(2) as pool:  # two openers make its tables once
        list(pool.map(lambda _: prepare_store(uri, "lab", tmp_path), range(2)))
    run = MlflowRun.start(uri, "lab", "run", {}, {}, tmp_path)
    rows = [{"step": s, "train_loss": 0.1 * s, "lr": float("nan"), "seconds": 0.1 * s} for s in range(30)]
    run.log_rows(rows)
    run._charted = {}  # as for a process that was killed before it knew that they had arrived
    run.log_rows(rows)
    run.finish("finished", metrics={"val_loss": 1.5})
    client = connect(uri)
    for key, count in (("loss/train", 30), ("optim/lr", 30), ("nonfinite", 30), ("result/val_loss", 1)):
        assert len(client.get_metric_history(run.run_id, key)) == count


@pytest.mark.usefixtures("no_password")
def test_a_password_that_is_missing_or_wrong_is_a_mistake_that_says_where_to_put_it(
    postgres, tmp_path, monkeypatch
):
    for refused in (
        lambda url: open_storage(url, tmp_path),
        lambda url: prepare_store(url, "lab", tmp_path),
    ):
        with pytest.raises(MuonlabError, match=r"\$PGPASSWORD or ~/\.pgpass") as caught:
            refused(postgres.url("postgres", password=None))
        assert "\n" not in str(caught.value)
        with pytest.raises(MuonlabError, match="password authentication failed") as caught:
            refused(postgres.url("postgres", password="0ther"))
        assert type(caught.value) is MuonlabError
        assert "0ther" not in str(caught.value)
        with pytest.raises(MuonlabError, match=r'database "nowhere" does not exist') as caught:
            refused(postgres.url("nowhere"))
        assert type(caught.value) is MuonlabError
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    url = postgres.create("places").replace(f":{PASSWORD}", "")
    open_storage(url, tmp_path)
    monkeypatch.delenv("PGPASSWORD")
    pgpass = tmp_path / "pgpass"
    pgpass.write_text(f"127.0.0.1:*:*:*:{PASSWORD}\n")
    pgpass.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(pgpass))
    open_storage(url, tmp_path)


def test_a_server_that_is_gone_is_a_fault_of_the_environment_at_once(tmp_path):
    url = f"postgresql://lab:{PASSWORD}@127.0.0.1:9/x"
    for refused in (
        lambda: open_storage(url, tmp_path),
        lambda: prepare_store(url, "lab", tmp_path),
    ):
        with pytest.raises(EnvironmentFault, match=r"[Cc]onnection refused") as caught:
            refused()
        assert PASSWORD not in str(caught.value)
