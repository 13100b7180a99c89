import json
import math
import os
import signal
import socket
import subprocess
import sys

import pandas as pd
import pytest
import torch

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record import RunRecord, load_run
from muonlab.record.environment import Environment
from muonlab.record.lease import LeaseLost
from muonlab.record.owner import process_start

WRITER = """
import sys, time
from muonlab.record import RunRecord
record = RunRecord.create(sys.argv[1], {"seed": 1}, [], {})
for step in range(5):
    record.append(step, {"train_loss": 5.0 - step})
    if step == 3:
        record.flush()
print("written", flush=True)
time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that has flushed four steps of five and keeps running."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_finished_run_comes_back_whole(record, config, append_steps):
    append_steps(record, range(7))
    record.finish("finished", metrics={"val_loss": 2.5, "tokens": 10**16 + 1})
    run = load_run(record.folder)
    assert run.config == config
    assert (run.status, run.cause) == ("finished", "")
    assert run.metrics == {"val_loss": 2.5, "tokens": 10**16 + 1}
    assert run.routing == [{"name": "w", "shape": [3, 4]}]
    assert run.environment == Environment(host="here")
    assert run.steps["step"].tolist() == list(range(7))
    assert len(run.max_logits) == 7 * 2 * 3
    assert sorted(path.name for path in record.folder.rglob("*.parquet")) == [
        "max_logits.parquet",
        "steps.parquet",
    ]


def test_the_config_keeps_every_kind_of_value(tmp_path):
    config = {
        "lr": 1e-5,
        "tau": math.inf,
        "on": True,
        "off": None,
        "name": "1e-3",
        "list": [1, "a"],
        "möwe": "ß",
    }
    RunRecord.create(tmp_path / "run", config | {"pair": (1, 2)}, [], {})
    assert load_run(tmp_path / "run").config == config | {"pair": [1, 2]}


@pytest.mark.parametrize(
    "status", ["finished", "diverged", "pruned", "out-of-memory", "failed", "interrupted"]
)
def test_every_ending_is_kept_with_its_cause(record, status):
    assert record.status == load_run(record.folder).status == "running"
    record.finish(status, cause="train_loss is nan at step 1")
    assert record.status == load_run(record.folder).status == status
    assert load_run(record.folder).cause == "train_loss is nan at step 1"


@pytest.mark.parametrize("status", ["running", "done", "finish"])
def test_what_does_not_end_a_run_is_refused(record, status):
    with pytest.raises(MuonlabError, match=f"unknown final status '{status}'"):
        record.finish(status)


def test_infinite_and_nan_metrics_are_exact_and_the_file_is_standard_json(record):
    metrics = {"a": math.inf, "b": -math.inf, "c": math.nan, "d": torch.tensor(0.1, dtype=torch.float64)}
    record.finish("diverged", "nan", metrics)
    kept = load_run(record.folder).metrics
    assert (kept["a"], kept["b"], kept["d"]) == (math.inf, -math.inf, 0.1)
    assert math.isnan(kept["c"])

    def no_constants(name):
        raise AssertionError(name)

    for path in record.folder.glob("*.json"):
        json.loads(path.read_text(), parse_constant=no_constants)


def test_a_second_record_in_the_folder_is_refused(record, config):
    with pytest.raises(MuonlabError, match="holds this run already"):
        RunRecord.create(record.folder, config | {"paths": {"runs": "elsewhere"}}, [], {})
    other = config | {"seed": 2}
    another = r"holds another run \([0-9a-f]{10}, not [0-9a-f]{10}\)"
    with pytest.raises(MuonlabError, match=another):
        RunRecord.create(record.folder, other, [], {})
    record.close()
    with pytest.raises(MuonlabError, match=another):
        RunRecord.reopen(record.folder, other)
    assert [path.name for path in record.folder.parent.iterdir()] == ["run"]


def test_folders_that_cannot_take_a_record_give_one_sentence(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(MuonlabError, match=r"cannot write .*Not a directory"):
        RunRecord.create(tmp_path / "file" / "run", config, [], {})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(MuonlabError, match="holds files that are not a run"):
        RunRecord.create(tmp_path / "photos", config, [], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_gives_one_sentence(tmp_path, config):
    tmp_path.chmod(0o500)
    with pytest.raises(MuonlabError, match=r"cannot write .*Permission denied"):
        RunRecord.create(tmp_path / "run", config, [], {})


def test_an_empty_folder_may_become_a_run(tmp_path, config):
    (tmp_path / "run").mkdir()
    RunRecord.create(tmp_path / "run", config, [], {})
    assert load_run(tmp_path / "run").status == "running"


def test_a_killed_run_is_interrupted_and_resumes(writer, tmp_path):
    folder = tmp_path / "run"
    assert load_run(folder).status == "running"
    with pytest.raises(MuonlabError, match=f"being written by process {writer.pid}"):
        RunRecord.reopen(folder)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    run = load_run(folder)
    assert run.status == "interrupted"
    assert run.cause == f"process {writer.pid} on {socket.gethostname()} was killed"
    assert run.steps["train_loss"].tolist() == [5.0, 4.0, 3.0, 2.0]

    record = RunRecord.reopen(folder, {"seed": 1})
    assert record.status == "running"
    record.truncate(1)
    for step in range(2, 6):
        record.append(step, {"train_loss": 5.0 - step})
    record.finish("finished")
    run = load_run(folder)
    assert run.status == "finished"
    assert run.steps["train_loss"].tolist() == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    sessions = json.loads((folder / "status.json").read_text())["sessions"]
    assert [session["pid"] for session in sessions] == [writer.pid, os.getpid()]


def test_another_process_with_the_number_of_a_killed_one_is_not_it(record):
    lease = json.loads(record.lease.path.read_text())
    # Process 1 runs, but did not start when the writer did.
    lease |= {"pid": 1, "pid_started": (process_start(1) or 0) + 1}
    record.lease.path.write_text(json.dumps(lease))
    assert load_run(record.folder).status == "interrupted"


def test_a_run_of_another_machine_runs_until_its_heart_stops(record, monkeypatch):
    monkeypatch.setenv("MUONLAB_BEAT", "0.05")
    lease = json.loads(record.lease.path.read_text())
    record.lease.path.write_text(json.dumps(lease | {"machine": "another", "every": 0.05}))
    assert load_run(record.folder).status == "running"
    again = RunRecord.reopen(record.folder)  # the record's own thread beats every 10 s, which is silence here
    assert again.status == "running"
    for write in (record.flush, lambda: record.truncate(-1), lambda: record.finish("finished")):
        with pytest.raises(LeaseLost, match="taken over by another process"):
            write()
    again.finish("finished")
    again.close()


def test_a_run_belongs_to_its_record_until_that_is_closed(record):
    with pytest.raises(EnvironmentFault, match="is being written by process"):
        RunRecord.reopen(record.folder)
    record.close()
    assert load_run(record.folder).status == "interrupted"
    record = RunRecord.reopen(record.folder)
    record.finish("finished")
    with pytest.raises(EnvironmentFault, match="is being written by process"):
        RunRecord.reopen(record.folder)
    record.close()
    assert not list(record.folder.glob(".lease*"))


def test_rows_are_all_that_is_on_disk_after_a_step(record, append_steps):
    append_steps(record, range(2))
    assert list(record.rows()) == []
    record.flush()
    append_steps(record, range(2, 3))
    record.flush()
    [rows] = record.rows()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert list(record.rows(after=1)) == [rows[2:]]
    assert list(record.rows(after=2)) == []


def test_the_same_steps_give_the_same_record(tmp_path, config, append_steps):
    runs = []
    for name in ("one", "two"):
        record = RunRecord.create(tmp_path / name, config, [], {})
        append_steps(record, range(80))
        record.finish("finished")
        runs.append(load_run(record.folder))
    for frame in ("steps", "max_logits", "events"):
        pd.testing.assert_frame_equal(*(getattr(run, frame) for run in runs), check_exact=True)
    one, two = (run.folder / "traces" / "steps.parquet" for run in runs)
    assert one.read_bytes() == two.read_bytes()
