"""`python -m muonlab.study.repair` makes queue, folders and MLflow consistent, repeatably, and reports each change."""

import json
import os
import shutil

import pytest
from tiny_designs import search

from muonlab.errors import EnvironmentFault
from muonlab.record import load_run
from muonlab.record.lease import Lease
from muonlab.record.mlflow_link import Link
from muonlab.record.owner import Owner
from muonlab.record.store import connect, store_uri
from muonlab.study.queue import Queue
from muonlab.study.repair import main, repair
from muonlab.study.run import close_study, help_with, train_study
from muonlab.study.storage import open_storage
from muonlab.train.run import run_folder


@pytest.fixture
def trained(study, tmp_path, first_store, monkeypatch):
    """A study of two runs that are over, shown in MLflow."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    shutil.copy(first_store[0], tmp_path / "runs" / "mlflow.db")
    plan = {"search": {"search": search(trials=2), "seeds": [0]}}
    made = study(plan, overrides=["tracking=mlflow"])
    train_study(made)
    return made


def dies_after_claiming(study, slot, monkeypatch):
    """A worker takes a slot and is gone."""
    gone = Owner.read({**Owner.this().values(), "pid": 2**22 + 1, "pid_started": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "this", classmethod(lambda cls: gone))
        patch.setattr(Owner, "alive", property(lambda owner: True))
        return Queue(open_storage(None, study.folder), study.name, study.design).claim(slot)


def test_a_study_is_repaired_in_all_three_stores_and_once_only(trained, tmp_path, monkeypatch, capsys):
    first, second = (run_folder(slot.config) for slot in trained.slots())
    before = load_run(second).steps
    client = connect(store_uri(None, tmp_path / "runs"))
    experiment = client.get_experiment_by_name("muonlab").experiment_id
    assert list(repair(trained)) == []

    # MLflow lost a run and has one that no folder knows; a checkpoint and the journal are torn.
    client.delete_run(Link.read(second).run_id)
    stray = client.create_run(experiment, tags={"study": trained.name}).info.run_id
    checkpoint = max((first / "checkpoints").iterdir())
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    journal = trained.folder / "journal.log"
    journal.write_bytes(journal.read_bytes() + b'{"op_code":5,"wor')
    monkeypatch.setattr("sys.argv", ["muonlab.study.repair", str(trained.folder)])
    capsys.readouterr()
    assert main() == 0
    said = capsys.readouterr().out
    for part in (
        "journal.log: moved a damaged line of 17 bytes to journal.torn",
        f"{first}: set aside torn checkpoints/{checkpoint.name}.torn",
        f"{second}: completed its MLflow run",
        f"MLflow run {stray}: belongs to no folder; ended as KILLED",
    ):
        assert part in said
    assert len(said.splitlines()) == 4
    shown = client.search_runs([experiment], "tags.study = 'tiny'")
    assert {run.info.status for run in shown if run.data.tags.get("role") != "study"} == {
        "FINISHED",
        "KILLED",
    }
    points = client.get_metric_history(Link.read(second).run_id, "loss/train")
    assert sorted(point.step for point in points) == list(before["step"])
    assert main() == 0
    assert capsys.readouterr().out == "nothing to repair\n"


def test_a_dead_workers_slot_is_counted_or_open_again(study, monkeypatch):
    made = study({"search": {"search": search(trials=2), "seeds": [0]}})
    made.save()
    slots = made.slots()
    assert dies_after_claiming(made, slots[0], monkeypatch)
    assert list(repair(made)) == [f"{slots[0].name}: its worker died; the slot is open again"]
    train_study(made)
    assert dies_after_claiming(made, slots[1], monkeypatch)
    assert list(repair(made)) == [
        f"{slots[1].name}: its worker died after the run ended as finished; it counts now"
    ]
    assert list(repair(made)) == []


def test_a_torn_status_and_what_dead_processes_left_are_put_away(trained, tmp_path):
    first, _ = (run_folder(slot.config) for slot in trained.slots())
    gone = {**Owner.this().values(), "pid": 2**22 + 1, "pid_started": 1}
    (first / ".lease-000007").write_text(json.dumps({"token": "x", "every": 10.0, **gone}))
    (first / "status.json").write_text('{"status": "fini')
    said = list(repair(trained))
    assert f"{first}: removed .lease-000007 of a dead process" in said
    assert f"{first}: set aside torn status.json.torn" in said
    assert list(repair(trained)) == []
    done, _, _ = train_study(trained)  # goes on from the last checkpoint
    assert len(done) == 2
    assert load_run(first).status == "finished"


def test_nothing_is_repaired_while_a_run_is_written(trained):
    first, _ = (run_folder(slot.config) for slot in trained.slots())
    lease = Lease.take(first)
    (first / "status.json").write_text("half")
    try:
        with pytest.raises(EnvironmentFault) as caught:
            list(repair(trained))
        assert "\n" not in str(caught.value)
        assert (first / "status.json").read_text() == "half"
    finally:
        lease.release()


def test_a_worker_of_a_finished_study_leaves_its_mlflow_run_ended(trained, tmp_path):
    runs = [(slot, run_folder(slot.config)) for slot in trained.slots()]
    for _ in range(2):  # a command that was killed at its end is run again
        close_study(trained, trained.folder, "said", {"loss_by_multiple/muon": {1: 2.5, 8: 3.0}}, runs)
    assert help_with(trained) == 0
    client = connect(store_uri(None, tmp_path / "runs"))
    run_id = Link.read(trained.folder).run_id
    shown = client.get_run(run_id)
    assert shown.info.status == "FINISHED"
    every = client.search_runs([shown.info.experiment_id])
    data = {
        run.info.run_id: [(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs]
        for run in every
    }
    assert len(every) == 3
    assert len(data[run_id]) == 1
    assert set(map(tuple, data.values())) == {tuple(data[run_id])}
    points = client.get_metric_history(run_id, "loss_by_multiple/muon")
    assert [(point.step, point.value) for point in points] == [(1, 2.5), (8, 3.0)]
