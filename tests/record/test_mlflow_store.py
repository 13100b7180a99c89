import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
import time
import warnings
from contextlib import closing

import pytest

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record import MlflowRun, database, prepare_store, store_uri
from muonlab.record.mlflow_link import Link
from muonlab.record.store import connect, without_password


def in_processes(count, target, *arguments):
    """Run target(index, *arguments) in forked processes at once; their exit codes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads at a fork
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=target, args=(index, *arguments)) for index in range(count)]
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def prepare(index, folder):
    prepare_store(store_uri(None, folder), "lab", folder / "artifacts")


def log_some(index, uri, folder):
    (folder / str(index)).mkdir()
    run = MlflowRun.start(uri, "lab", f"run {index}", {"index": index}, {}, folder / str(index))
    for begin in range(0, 60, 10):
        run.log_rows([{"step": step, "train_loss": float(step)} for step in range(begin, begin + 10)])
    run.finish("finished")


def test_without_a_uri_the_store_is_mlflows_own_choice_or_a_file_here(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://lab:5000")
    assert store_uri(None, tmp_path) == "http://lab:5000"
    assert store_uri("https://other", tmp_path) == "https://other"


def test_a_store_is_made_once_and_found_again(store, tmp_path):
    client = connect(store)
    experiment = client.get_experiment_by_name("lab")
    assert experiment.artifact_location == (tmp_path / "artifacts" / "lab").as_uri()
    assert prepare_store(store, "lab", tmp_path / "artifacts") == experiment.experiment_id
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_processes_that_begin_together_make_one_store(store, tmp_path):
    # `store` has loaded MLflow, so the forked processes reach the migrations at the same moment.
    assert in_processes(3, prepare, tmp_path / "fresh") == [0, 0, 0]
    client = connect(store_uri(None, tmp_path / "fresh"))
    assert sorted(experiment.name for experiment in client.search_experiments()) == ["Default", "lab"]


def test_forked_processes_log_beside_their_parent(store, tmp_path):
    parent = MlflowRun.start(store, "lab", "parent", {}, {}, tmp_path)
    parent.log_rows([{"step": 0, "train_loss": 1.0}])
    assert in_processes(3, log_some, store, tmp_path) == [0, 0, 0]
    parent.log_rows([{"step": 1, "train_loss": 1.0}])
    client = connect(store)
    runs = client.search_runs([client.get_experiment_by_name("lab").experiment_id])
    points = {run.info.run_name: client.get_metric_history(run.info.run_id, "loss/train") for run in runs}
    assert {name: len(history) for name, history in points.items()} == {
        "parent": 2,
        "run 0": 60,
        "run 1": 60,
        "run 2": 60,
    }
    assert {run.info.status for run in runs if run.info.run_name != "parent"} == {"FINISHED"}


@pytest.mark.parametrize("uri", ["./mlruns", "file:///somewhere", "mlruns", "redis://host"])
def test_stores_that_mlflow_cannot_use_give_one_sentence(tmp_path, uri):
    with pytest.raises(
        MuonlabError, match=f"MLflow cannot track to '{uri}'; allowed are URIs beginning with sqlite"
    ):
        prepare_store(uri, "lab", tmp_path)


def test_an_unreachable_server_gives_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MuonlabError, match=r"store http://me:\*\*\*@127.0.0.1:9: .*refused"):
        prepare_store("http://me:secret@127.0.0.1:9", "lab", tmp_path)


def test_a_file_that_is_not_a_store_gives_one_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_text("Shall I compare thee to a summer's day?" * 50)
    with pytest.raises(MuonlabError, match="file is not a database"):
        prepare_store(store_uri(None, tmp_path), "lab", tmp_path)


def test_a_deleted_experiment_gives_one_sentence(store, tmp_path):
    client = connect(store)
    client.delete_experiment(client.get_experiment_by_name("lab").experiment_id)
    with pytest.raises(MuonlabError, match="experiment 'lab' was deleted"):
        prepare_store(store, "lab", tmp_path)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
    ],
)
def test_passwords_are_never_shown(uri, shown):
    assert without_password(uri) == shown


def test_the_first_store_is_made_without_a_word(first_store):
    _, printed = first_store
    assert printed == ""


# ---------------------------------------------------------------------- kills, locks, odd folders
def make_and_hang(folder):
    """Make a store, and stay in its migration: a table of the new database is there, the others are not."""
    from mlflow.store.db import utils

    def hang(engine):
        with engine.connect():
            (folder / "migrating").touch()
        time.sleep(60)

    utils._upgrade_db = hang
    prepare(0, folder)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_first_command_that_is_stopped_in_the_migration_costs_nothing(tmp_path, first_store, sent):
    folder = tmp_path / "runs"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        maker = multiprocessing.get_context("fork").Process(target=make_and_hang, args=(folder,))
        maker.start()
    while not (folder / "migrating").exists():
        time.sleep(0.01)
    assert not (folder / "mlflow.db").exists()
    os.kill(maker.pid, sent)
    maker.join()
    prepare(0, folder)
    assert {path.name for path in folder.iterdir()} <= {
        "migrating", "mlflow.db", "mlflow.db.lock", "mlflow.db-wal", "mlflow.db-shm"
    }  # fmt: skip
    assert connect(store_uri(None, folder)).get_experiment_by_name("lab")


def half_made(path, kept):
    """What a command of the last version left that was killed within its migration: some tables, an old revision."""
    with closing(sqlite3.connect(path)) as connection:
        names = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        for name in names:
            if name not in kept and not name.startswith("sqlite_"):
                connection.execute(f'DROP TABLE "{name}"')
        connection.execute("DELETE FROM alembic_version")
        connection.commit()


@pytest.mark.parametrize(
    "kept", [("alembic_version", "experiments", "runs", "tags"), ("alembic_version", "registered_models")]
)
def test_a_database_that_an_older_kill_left_half_made_is_set_aside(tmp_path, first_store, capsys, kept):
    shutil.copy(first_store[0], tmp_path / "mlflow.db")
    half_made(tmp_path / "mlflow.db", kept)
    uri = store_uri(None, tmp_path)
    prepare_store(uri, "lab", tmp_path / "artifacts")
    assert connect(uri).get_experiment_by_name("lab")
    printed = capsys.readouterr().err
    [aside] = tmp_path.glob("mlflow.db.half-made-*")
    assert aside.name in printed
    assert printed.count("\n") == 1
    prepare_store(uri, "lab", tmp_path / "artifacts")
    assert capsys.readouterr().err == ""


def test_a_database_with_runs_is_never_set_aside(store, tmp_path):
    MlflowRun.start(store, "lab", "run", {}, {}, tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        connection.commit()
    with pytest.raises(MuonlabError, match="out-of-date database schema") as caught:
        prepare_in_a_process(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*half-made*"))


def prepare_in_a_process(folder):
    """MLflow looks at a schema once a process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        pool.apply(prepare, (0, folder))


@pytest.fixture
def locked(store, tmp_path):
    """A store that somebody locks, and what frees it."""
    with closing(
        sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False)
    ) as held:
        held.execute("BEGIN IMMEDIATE")
        yield store, lambda: held.execute("ROLLBACK")


def test_a_locked_store_is_waited_for_with_a_message(locked, tmp_path, monkeypatch, capsys):
    uri, free = locked
    monkeypatch.setattr(database, "SILENCE", 0.2)
    timer = threading.Timer(1.0, free)
    timer.start()
    prepare_store(uri, "lab", tmp_path)
    timer.join()
    assert "waiting for" in capsys.readouterr().err


def test_a_store_that_stays_locked_is_a_fault_of_the_environment(locked, tmp_path, monkeypatch):
    monkeypatch.setattr(database, "PATIENCE", 0.5)
    with pytest.raises(EnvironmentFault, match=r"mlflow\.db has been locked by another process for"):
        prepare_store(locked[0], "lab", tmp_path)


@pytest.mark.parametrize("name", ["a b", "50%", "what?", "no #1", "%20"])
def test_a_store_may_lie_in_any_folder(tmp_path, first_store, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(first_store[0], folder / "mlflow.db")
    prepare_store(store_uri(None, folder), "lab", folder / "artifacts")
    run = MlflowRun.start(store_uri(None, folder), "lab", "run", {}, {}, folder)
    run.log_rows([{"step": 0, "train_loss": 1.0}])
    run.finish("finished")
    assert connect(store_uri(None, folder)).get_run(run.run_id).info.status == "FINISHED"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert Link.read(folder).complete
