"""A port that is taken is passed over, and what cannot be shown is one sentence."""

import shutil
import socket
import sys
from urllib.parse import parse_qs

import pytest

from muonlab import ui
from muonlab.errors import MuonlabError
from muonlab.train.config import TrackingSettings
from muonlab.train.tracking import open_study_run


@pytest.fixture
def taken():
    """A port of this machine that somebody listens at."""
    with socket.socket() as server:
        server.bind((ui.HOST, 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_taken_port_gives_one_sentence_and_the_next_free_one(taken, capsys):
    port = ui.free_port(taken)
    assert taken < port < taken + ui.PORTS
    assert capsys.readouterr().err == f"muonlab: port {taken} is taken; the next free one is {port}\n"
    with socket.socket() as server:
        server.bind((ui.HOST, port))


def test_a_free_port_is_taken_without_a_word(taken, capsys):
    port = ui.free_port(taken)
    capsys.readouterr()
    assert ui.free_port(port) == port
    assert capsys.readouterr().err == ""


def test_no_free_port_and_no_port_at_all_are_mistakes(taken, monkeypatch):
    monkeypatch.setattr(ui, "PORTS", 1)
    with pytest.raises(MuonlabError, match=f"no port from {taken} on is free"):
        ui.free_port(taken)
    for number in (0, -1, 1 << 16):
        with pytest.raises(MuonlabError, match=f"--port must be at least 1 and at most 65,535, not {number}"):
            ui.free_port(number)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "nowhere"], "there are no runs to show: .*nowhere/mlflow.db"),
        (["nowhere"], "no study in nowhere"),
    ],
)
def test_nothing_to_show_is_one_sentence(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["muonlab.ui", *arguments])
    with pytest.raises(MuonlabError, match=message):
        ui.main()
    assert list(tmp_path.iterdir()) == []


def test_mlflow_is_started_on_the_free_port(taken, monkeypatch, tmp_path):
    (tmp_path / "mlflow.db").touch()
    started = []
    monkeypatch.setattr(ui.os, "environ", {})
    monkeypatch.setattr(ui.os, "execv", lambda program, arguments: started.extend(arguments))
    monkeypatch.setattr(sys, "argv", ["muonlab.ui", "--runs", str(tmp_path), "--port", str(taken)])
    ui.main()
    assert int(started[started.index("--port") + 1]) > taken
    assert started[-2:] == ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]


def test_the_charts_of_the_newest_study_are_opened_as_model_training(tmp_path, first_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database = tmp_path / "mlflow.db"
    shutil.copy(first_store[0], database)
    assert ui.charts_page(database) is None
    tracking = TrackingSettings(name="mlflow", experiment="lab")
    for name in ("older", "newest"):
        (tmp_path / name).mkdir()
        open_study_run(tracking, tmp_path, name, tmp_path / name, {})
    page, _, query = ui.charts_page(database).partition("?")
    assert page == "#/experiments/2/runs"  # 0 is MLflow's own, 1 the template's
    assert parse_qs(query) == {
        "workflowType": ["machine_learning"],
        "compareRunsMode": ["CHART"],
        "searchFilter": ["tags.study = 'newest'"],
    }


def test_a_file_that_is_no_database_has_no_charts(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database, but long enough to be read as one" * 40)
    assert ui.charts_page(tmp_path / "mlflow.db") is None
