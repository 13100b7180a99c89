"""A run in MLflow that is resumed, killed or forgotten, and a store that is gone for a while."""

import json
import math
import os
import warnings

import pytest
from mlflow_points import points, refuse

from muonlab.errors import MuonlabError
from muonlab.record import MlflowRun
from muonlab.record import mlflow_run as module
from muonlab.record.mlflow_link import Link
from muonlab.record.store import connect


def test_a_resumed_run_continues_where_it_stopped(store, begin, record, append_steps):
    run = begin({"lr": 0.1}, folder=record.folder)
    append_steps(record, range(20))
    record.flush()
    run.log_rows(
        *record.rows()
    )  # killed here; the checkpoint of step 20 is torn, the one before is of step 10

    record.truncate(9)
    resumed = begin({"lr": 0.1}, folder=record.folder)
    assert resumed.run_id == run.run_id
    assert resumed.first_step == 19
    append_steps(record, range(10, 30))
    # Computed again, steps 10 to 19 differ in the clock alone; MLflow would keep both.
    record.flush()
    [rows] = record.rows(after=9)
    resumed.log_rows(row | {"seconds": row["seconds"] + 100} for row in rows)
    resumed.finish("finished")
    assert [step for step, _ in points(store, resumed, "loss/train")] == list(range(30))
    kept = connect(store).get_run(run.run_id)
    assert kept.info.status == "FINISHED"
    assert "muonlab.params_changed" not in kept.data.tags


@pytest.mark.parametrize("stop", [3, 10, 11, 15, 19, 20])
def test_a_resumed_run_shows_the_steps_that_an_undisturbed_one_shows(store, begin, stop):
    rows = [{"step": s, "train_loss": 1.0 * s, "lr": 0.5, "seconds": 0.25 * s} for s in range(35)]
    for row in rows[::4]:
        row["weight_rms/muon"] = 2.0
    rows[13]["lr"] = math.nan
    whole, cut = begin(), begin()
    whole.log_rows(rows)
    cut.log_rows(rows[:stop])
    resumed = begin(folder=cut._folder)
    resumed.log_rows(rows)
    for key in ("loss/train", "optim/lr", "optim/weight_rms/muon", "nonfinite"):
        steps = [[step for step, _ in points(store, run, key)] for run in (whole, resumed)]
        assert steps[0] == steps[1]
        assert steps[0]


def test_what_a_killed_run_had_not_sent_is_sent_from_the_record(store, begin, record, append_steps):
    run = begin(folder=record.folder)
    append_steps(record, range(5))
    record.flush()
    run.log_rows(*record.rows())
    append_steps(record, range(5, 10))
    record.flush()  # killed between the record and MLflow
    resumed = begin(folder=record.folder)
    resumed.log_rows(*record.rows())
    assert [step for step, _ in points(store, resumed, "loss/train")] == list(range(10))


def test_a_kill_between_two_requests_doubles_and_loses_nothing(store, begin, monkeypatch):
    run = begin()
    rows = [{"step": s, "train_loss": 1.0, "grad_norm": 2.0, "val_loss": 3.0} for s in range(400)]
    send, sent = run._client.log_batch, []

    def first_only(*arguments, **settings):
        if sent:
            raise ConnectionError("killed")
        sent.append(send(*arguments, **settings))

    monkeypatch.setattr(run._client, "log_batch", first_only)
    with pytest.warns(UserWarning, match="killed"):
        run.log_rows(rows)
    resumed = begin(folder=run._folder)
    assert resumed.first_step == 333  # 1,000 points end within that step
    resumed.log_rows({**row, "seconds": 9.0} for row in rows)
    for key in ("loss/train", "optim/grad_norm", "loss/val"):
        assert [step for step, _ in points(store, resumed, key)] == list(range(400))


def test_what_a_store_took_without_an_answer_is_not_doubled(store, begin, monkeypatch):
    """The connection broke after the store had committed: the same points are sent again."""
    run = begin()
    send, sent = run._client.log_batch, []

    def take_and_fail(*arguments, **settings):
        sent.append(send(*arguments, **settings))
        if len(sent) == 1:
            raise ConnectionError("no answer")

    monkeypatch.setattr(run._client, "log_batch", take_and_fail)
    rows = [{"step": s, "train_loss": 1.0, "lr": math.nan, "seconds": 0.5 * s} for s in range(20)]
    with pytest.warns(UserWarning, match="no answer"):
        run.log_rows(rows)
    run.log_rows([])
    run.finish("finished", metrics={"val_loss": 2.5})
    for key in ("loss/train", "optim/lr", "nonfinite"):
        assert [step for step, _ in points(store, run, key)] == list(range(20))
    assert Link.read(run._folder).complete


def test_a_run_that_was_killed_before_its_id_was_kept_is_found_again(store, begin, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*arguments, **settings):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Link, "keep", kill)
        with pytest.raises(Killed):
            begin(folder=tmp_path / "run")
    assert Link.read(tmp_path / "run").run_id is None
    run = begin(folder=tmp_path / "run")
    client = connect(store)
    every = client.search_runs([client.get_experiment_by_name("lab").experiment_id])
    assert [each.info.run_id for each in every] == [run.run_id]


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_torn_mlflow_json_is_set_aside_and_its_run_found_again(store, begin, tmp_path, cut):
    begin()  # of another folder
    run = begin(folder=tmp_path / "run")
    run.log_rows([{"step": 0, "train_loss": 1.0}])
    file = tmp_path / "run" / "mlflow.json"
    os.truncate(file, cut)
    resumed = begin(folder=tmp_path / "run")
    assert resumed.run_id == run.run_id
    assert json.loads(file.read_text())["run_id"] == run.run_id
    assert (tmp_path / "run" / "mlflow.json.torn").stat().st_size == cut
    resumed.log_rows([{"step": step, "train_loss": 1.0} for step in range(2)])
    assert [step for step, _ in points(store, run, "loss/train")] == [0, 1]


def test_a_run_is_complete_once_the_store_has_all_of_it(begin, record, monkeypatch):
    run = begin(folder=record.folder)
    assert not Link.read(record.folder).complete
    with monkeypatch.context() as broken:
        broken.setattr(run._client, "log_artifact", refuse)
        with pytest.warns(UserWarning, match="gone"):
            run.log_folder(record.folder)
    run.finish("finished")
    assert not Link.read(record.folder).complete
    again = begin(folder=record.folder)
    again.log_folder(record.folder)
    again.finish("finished")
    assert Link.read(record.folder).complete
    begin(folder=record.folder)
    assert not Link.read(record.folder).complete


def test_a_store_that_is_gone_for_long_is_one_warning_and_costs_no_memory(store, begin, monkeypatch):
    monkeypatch.setattr(module, "MOST_PENDING", 50)
    run = begin()
    rows = [{"step": s, "train_loss": 1.0, "seconds": 0.5 * s} for s in range(100)]
    with monkeypatch.context() as broken, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        broken.setattr(run._client, "log_batch", refuse)
        for begun in range(0, 100, 10):
            run.log_rows(rows[begun : begun + 10])
    assert [str(each.message).count("gone; the run continues") for each in caught] == [1]
    assert len(run._pending) == 0
    run.finish("finished")
    assert not Link.read(run._folder).complete
    resumed = begin(folder=run._folder)
    resumed.log_rows(rows)
    resumed.finish("finished")
    assert [step for step, _ in points(store, run, "loss/train")] == list(range(100))


def test_parameters_that_differ_on_resume_are_a_tag_not_an_end(store, begin):
    run = begin({"optimizer": {"lr": 0.1, "tau": 30}})
    begin({"optimizer": {"lr": 0.2, "tau": 30}, "new": 1}, folder=run._folder)
    kept = connect(store).get_run(run.run_id)
    assert kept.data.tags["muonlab.params_changed"] == "optimizer.lr: 0.1 -> 0.2"
    assert kept.data.params == {"optimizer.lr": "0.1", "optimizer.tau": "30", "new": "1"}


@pytest.mark.parametrize("lost", ["never was", "deleted"])
def test_a_run_that_the_store_has_lost_begins_anew_with_the_same_clock(store, begin, lost):
    first = begin()
    client = connect(store)
    if lost == "deleted":
        client.delete_run(first.run_id)
    else:
        client.delete_run(first.run_id)
        Link.read(first._folder).keep(first._folder, run_id="0" * 32)
    run = begin(folder=first._folder)
    assert run.run_id not in (first.run_id, "0" * 32)
    assert client.get_run(run.run_id).info.start_time == client.get_run(first.run_id).info.start_time
    run.log_rows([{"step": 0, "train_loss": 1.0}])
    assert points(store, run, "loss/train") == [(0, 1.0)]


def test_a_store_that_fails_does_not_end_the_training_and_catches_up(store, begin, monkeypatch):
    run = begin()
    run.log_rows([{"step": 0, "train_loss": 1.0}])
    with monkeypatch.context() as broken:
        broken.setattr(run._client, "log_batch", refuse)
        with pytest.warns(UserWarning, match=r"cannot use the MLflow store .*: gone; the run continues"):
            run.log_rows([{"step": 1, "train_loss": 1.0}])
    run.log_rows([{"step": 2, "train_loss": 1.0}])
    run.finish("finished")
    assert [step for step, _ in points(store, run, "loss/train")] == [0, 1, 2]


def test_an_experiment_that_was_not_prepared_is_an_error(store, tmp_path):
    with pytest.raises(MuonlabError, match="no MLflow experiment 'other'"):
        MlflowRun.start(store, "other", "name", {}, {}, tmp_path)
