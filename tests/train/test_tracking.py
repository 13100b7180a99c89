"""The MLflow run of a record that was left behind is completed by the next command."""

import getpass
import json
import pickle
import shutil
import sys
from subprocess import run as call

import pytest

from muonlab.record import load_run
from muonlab.record.environment import Environment
from muonlab.record.lease import Lease
from muonlab.record.mlflow_link import Link
from muonlab.record.mlflow_run import MlflowRun
from muonlab.record.store import connect, store_uri
from muonlab.train.run import run_folder, train
from muonlab.train.tracking import open_mlflow, open_store, reconcile_mlflow, shown_name


@pytest.fixture
def trained(tiny, tmp_path, first_store, monkeypatch):
    """(settings, folder) of a tiny run that ended while its store refused every point."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = tiny("tracking=mlflow")
    (tmp_path / "runs").mkdir()
    shutil.copy(first_store[0], tmp_path / "runs" / "mlflow.db")

    def refuse(*arguments):
        raise ConnectionError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowRun, "_send", refuse)
        with pytest.warns(UserWarning, match="gone"):
            train(config)
    return config, run_folder(config)


def shown(config, folder):
    """(MLflow's run, its loss curve's steps) of a folder; there is no other run."""
    client = connect(store_uri(None, config.paths.runs))
    [run] = client.search_runs([client.get_experiment_by_name(config.tracking.experiment).experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss/train")
    return run, sorted(point.step for point in history)


def test_a_run_whose_store_failed_at_its_end_is_completed_from_its_record(trained):
    config, folder = trained
    run, steps = shown(config, folder)
    assert (run.info.status, steps) == ("RUNNING", [])
    assert reconcile_mlflow(config, folder)
    run, steps = shown(config, folder)
    record = load_run(folder)
    assert (run.info.status, run.data.tags["muonlab.status"]) == ("FINISHED", "finished")
    assert steps == list(record.steps["step"])
    assert run.data.metrics["result/val_loss"] == pytest.approx(record.metrics["val_loss"], rel=1e-12)
    assert not reconcile_mlflow(config, folder)
    assert shown(config, folder)[1] == steps


def test_a_lost_database_is_filled_again_and_a_complete_run_costs_no_import(trained, tmp_path):
    config, folder = trained
    assert reconcile_mlflow(config, folder)
    before, steps = shown(config, folder)
    check = (
        "import sys, pickle; from pathlib import Path; from muonlab.train.tracking import reconcile_mlflow\n"
        "config = pickle.load(sys.stdin.buffer); assert not reconcile_mlflow(config, Path(sys.argv[1]))\n"
        "assert 'mlflow' not in sys.modules and 'torch' not in sys.modules"
    )
    done = call([sys.executable, "-c", check, str(folder)], input=pickle.dumps(config), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    for file in (tmp_path / "runs").glob("mlflow.db*"):
        file.unlink()
    assert reconcile_mlflow(config, folder)
    after, again = shown(config, folder)
    assert again == steps
    assert after.info.start_time == before.info.start_time


def test_a_killed_run_is_ended_without_the_steps_that_it_will_compute_again(trained):
    config, folder = trained
    state = json.loads((folder / "status.json").read_text())
    session = state["sessions"][-1] | {"pid": 2**22 + 1, "pid_started": 1}
    session.pop("ended")
    state |= {"status": "running", "metrics": {}, "sessions": [session]}
    (folder / "status.json").write_text(json.dumps(state))
    last = folder / "checkpoints" / "step-00000012.ckpt"
    last.rename(last.with_name("step-00000008.ckpt"))
    assert reconcile_mlflow(config, folder)
    run, steps = shown(config, folder)
    assert (run.info.status, run.data.tags["muonlab.status"]) == ("KILLED", "interrupted")
    assert steps == list(range(8))


def test_a_run_that_is_still_written_is_left_alone(trained):
    config, folder = trained
    state = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(state | {"status": "running"}))
    lease = Lease.take(folder)
    assert not reconcile_mlflow(config, folder)
    lease.release()
    assert shown(config, folder)[0].info.status == "RUNNING"


def test_a_record_without_a_run_in_mlflow_gets_one(trained):
    config, folder = trained
    client = connect(store_uri(None, config.paths.runs))
    client.delete_run(Link.read(folder).run_id)
    (folder / "mlflow.json").unlink()
    assert reconcile_mlflow(config, folder)
    assert shown(config, folder)[1] == list(range(12))


def test_a_run_of_the_last_version_continues_in_the_same_mlflow_run(trained):
    config, folder = trained
    run_id = Link.read(folder).run_id
    (folder / "mlflow.json").write_text(json.dumps({"run_id": run_id}))
    store = open_store(config.tracking, folder.parent)
    assert open_mlflow(store, config, folder, Environment(data={"name": "n", "digest": "d"})).run_id == run_id


def test_source_user_and_commit_of_a_run_are_known(trained):
    config, folder = trained
    environment = load_run(folder).environment
    tags = shown(config, folder)[0].data.tags
    assert tags["mlflow.source.name"] == environment.command
    assert (tags["mlflow.source.type"], tags["mlflow.user"]) == ("LOCAL", getpass.getuser())
    assert tags.get("mlflow.source.git.commit") == environment.commit


def test_runs_of_a_study_that_differ_by_their_arm_alone_have_different_names(tiny):
    config = tiny("optimizer=muon", "optimizer.lr=0.02")
    first, second = (config.tracked(trial=trial) for trial in ("arms/plain/s1", "arms/old/s1"))
    assert (shown_name(first), shown_name(second)) == ("arms/plain/s1 lr=0.02", "arms/old/s1 lr=0.02")
    assert (first.name, shown_name(config)) == (config.name, config.name)
