"""The storage of a study's queue: made once by many, waited for while locked, and no password anywhere."""

import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from contextlib import closing

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError
from tiny_designs import search

from muonlab.cli import compose_config, plain
from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record import database
from muonlab.settings.address import public_address, storage_address, with_password, without_password
from muonlab.study import storage as module
from muonlab.study.pool import Pool
from muonlab.study.queue import Queue
from muonlab.study.reading import read_experiment
from muonlab.study.storage import open_storage
from muonlab.study.study import load_study
from muonlab.study.work import Worker
from muonlab.sweep import make_study
from muonlab.train.config import TrackingSettings

SECRET = "postgresql://me:s3cret@lab/queue"


def open_together(barrier, url, folder):
    barrier.wait()
    optuna.create_study(study_name="s", storage=open_storage(url, folder), load_if_exists=True)


def test_processes_that_open_a_new_database_at_once_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, url = context.Barrier(4), database.sqlite_url(tmp_path / "o.db")
    workers = [context.Process(target=open_together, args=(barrier, url, tmp_path)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert optuna.get_all_study_names(open_storage(url, tmp_path)) == ["s"]


def make_and_hang(url, folder):
    make = module.RDBStorage

    def hang(*arguments):
        make(*arguments)
        (folder / "made").touch()
        time.sleep(60)

    module.RDBStorage = hang
    open_storage(url, folder)


def test_a_kill_while_a_database_is_made_costs_nothing(tmp_path):
    url = database.sqlite_url(tmp_path / "o.db")
    maker = multiprocessing.get_context("fork").Process(target=make_and_hang, args=(url, tmp_path))
    maker.start()
    while not (tmp_path / "made").exists():
        time.sleep(0.01)
    assert not (tmp_path / "o.db").exists()
    os.kill(maker.pid, signal.SIGKILL)
    maker.join()
    assert list(tmp_path.glob(".o.db.*"))
    optuna.create_study(study_name="s", storage=open_storage(url, tmp_path))
    assert not list(tmp_path.glob(".o.db.*"))


@pytest.mark.parametrize("name", ["a b", "50%", "what?", "no #1", "%20", "ü"])
def test_a_database_may_lie_in_any_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    url = database.sqlite_url(tmp_path / name / "o.db")
    optuna.create_study(study_name="s", storage=open_storage(url, tmp_path))
    assert (tmp_path / name / "o.db").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert optuna.get_all_study_names(open_storage(url, tmp_path)) == ["s"]


@pytest.fixture
def locked(tmp_path):
    """A database that somebody locks, and what frees it."""
    path = tmp_path / "o.db"
    optuna.create_study(study_name="s", storage=open_storage(database.sqlite_url(path), tmp_path))
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield database.sqlite_url(path), lambda: connection.execute("ROLLBACK")


def test_a_locked_database_is_waited_for_with_a_message(locked, tmp_path, monkeypatch, capsys):
    url, free = locked
    monkeypatch.setattr(database, "SILENCE", 0.2)
    timer = threading.Timer(1.0, free)
    timer.start()
    assert optuna.get_all_study_names(open_storage(url, tmp_path)) == ["s"]
    timer.join()
    assert "waiting for" in capsys.readouterr().err


def test_a_database_that_stays_locked_is_a_fault_of_the_environment(locked, tmp_path, monkeypatch, study):
    url, free = locked
    monkeypatch.setattr(database, "PATIENCE", 0.5)
    with pytest.raises(EnvironmentFault, match=r"o\.db has been locked by another process") as caught:
        open_storage(url, tmp_path)
    assert "\n" not in str(caught.value)
    free()
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    made = study({"search": {"search": search(trials=2), "seeds": [0]}})
    queue = Queue(open_storage(url, tmp_path), made.name, made.design)
    with closing(sqlite3.connect(tmp_path / "o.db", isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(EnvironmentFault, match="database is locked"):
            queue.claim(made.slots()[0])
        connection.execute("ROLLBACK")
    assert queue.claim(made.slots()[0]) is not None


@pytest.mark.parametrize(
    ("url", "fault", "message"),
    [
        ("postgresql://me:s3cret@127.0.0.1:9/db", EnvironmentFault, "[Cc]onnection refused"),
        ("postgresql://me@lab:port/db", MuonlabError, "invalid literal"),
        ("nonsense", MuonlabError, "search.storage=nonsense: it is not a URL"),
        ("sqlite:////does/not/exist/o.db", MuonlabError, "unable to open database file"),
        ("nodatabase://x", MuonlabError, "nodatabase"),
        ("mysql://me:s3cret@lab/db", MuonlabError, "the Python package MySQLdb, is not installed"),
    ],
)
def test_what_cannot_be_opened_is_a_fault_or_a_mistake(tmp_path, url, fault, message):
    with pytest.raises(MuonlabError, match=message) as caught:
        open_storage(url, tmp_path)
    assert type(caught.value) is fault
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_driver_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "find_spec", lambda name: None)
    for url in (SECRET, SECRET.replace("postgresql", "postgresql+psycopg")):
        with pytest.raises(MuonlabError, match=r"pip install 'muonlab\[postgres\]'") as caught:
            open_storage(url, tmp_path)
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [KeyError("token"), TypeError("a bug"), ValueError("a bug"), RuntimeError("a bug")]
)
def test_a_bug_is_shown_at_once_and_not_tried_again(study, tmp_path, monkeypatch, error):
    made = study({"search": {"search": search(trials=2), "seeds": [0]}})
    queue = Queue(open_storage(None, tmp_path), made.name, made.design)

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(optuna.Study, "get_trials", broken)
    with pytest.raises(type(error)) as caught:
        Worker(queue, Pool(1, tmp_path / "logs")).run(made.slots(), "tiny", wait=True)
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        sqlite3.OperationalError("disk I/O error"),
        OperationalError("SELECT", {}, Exception("server closed the connection")),
        StorageInternalError("the database is gone"),
    ],
)
def test_what_a_database_or_the_system_refuses_is_a_fault_of_the_environment(
    study, tmp_path, monkeypatch, error
):
    made = study({"search": {"search": search(trials=2), "seeds": [0]}})
    queue = Queue(open_storage(None, tmp_path), made.name, made.design)

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(optuna.Study, "get_trials", broken)
    with pytest.raises(EnvironmentFault, match="cannot use the study's storage"):
        queue.claim(made.slots()[0])


# ---------------------------------------------------------------------- passwords
@pytest.mark.parametrize(
    "url",
    [
        SECRET,
        "postgresql+psycopg://me:s3cret@lab:5432/queue?sslmode=require",
        "postgresql://me:s3/cr@et:s3cret@lab/queue",
        "postgresql://lab/queue?user=me&password=s3cret",
        "http://me:s3cret@lab:5000",
        "python -m muonlab.sweep search.storage=postgresql://me:s3cret@lab/queue study=x",
    ],
)
def test_a_password_is_shown_nowhere_in_a_url(url):
    assert "s3cret" not in without_password(url)
    assert "***" in without_password(url)
    assert "lab" in without_password(url)


@pytest.mark.parametrize(
    "url", ["http://lab:5000/path@x", "sqlite:////a:b/c@d.db", "postgresql://me@lab/db", "a@b:c"]
)
def test_what_has_no_password_is_shown_as_it_is(url):
    assert without_password(url) == url


def test_settings_refuse_a_password_and_say_where_to_put_it(tiny_overrides, tmp_path):
    given = [*tiny_overrides, f"search.storage='{SECRET}'", f"paths.studies={tmp_path}"]
    design = read_experiment("sweep")
    with pytest.raises(MuonlabError, match=r"must not hold a password.*\$MUONLAB_STORAGE") as caught:
        make_study(design, plain(compose_config("sweep", [*design.common, *given])), given)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(MuonlabError, match=r"must not hold a password.*\$MLFLOW_TRACKING_URI") as caught:
        TrackingSettings(name="mlflow", uri="http://me:s3cret@lab:5000")
    assert "s3cret" not in str(caught.value)


def test_a_study_keeps_no_password_and_a_worker_has_its_own(study, monkeypatch):
    monkeypatch.setenv("MUONLAB_STORAGE", SECRET)
    made = study({"search": {"search": search(trials=2), "seeds": [0]}}, storage=storage_address(None))
    assert made.storage == SECRET
    made.save()
    for file in made.folder.iterdir():
        assert "s3cret" not in file.read_text()
    assert load_study(made.folder).storage == SECRET
    monkeypatch.setenv("MUONLAB_STORAGE", SECRET.replace("lab", "elsewhere"))
    assert load_study(made.folder).storage == public_address(SECRET) == "postgresql://me@lab/queue"
    monkeypatch.delenv("MUONLAB_STORAGE")
    assert load_study(made.folder).storage == "postgresql://me@lab/queue"


def test_a_study_on_a_journal_stays_there_whatever_the_environment_says(study, monkeypatch):
    made = study({"search": {"search": search(trials=2), "seeds": [0]}})
    made.save()
    monkeypatch.setenv("MUONLAB_STORAGE", SECRET)
    assert load_study(made.folder).storage is None
    assert with_password("postgresql://me@lab/queue") == SECRET
