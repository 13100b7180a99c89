"""Workers, fork servers and runs that are stopped and killed as processes: nothing is lost, doubled or left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from gate import __file__ as gate_file
from tiny_designs import search

from muonlab.errors import MuonlabError
from muonlab.record import load_run
from muonlab.record.lease import SILENCE, held
from muonlab.record.owner import process_start
from muonlab.settings.address import storage_address
from muonlab.study.heartbeat import Heartbeat
from muonlab.study.pool import Pool
from muonlab.study.queue import SILENT, Queue
from muonlab.study.run import help_with, train_study
from muonlab.study.storage import open_storage
from muonlab.study.study import load_study
from muonlab.train.run import run_folder

ROOT = Path(__file__).parents[2]
ONE = {"one": {"arms": {"adamw": ["optimizer=adamw"]}, "seeds": [1]}}
# In a namespace of process numbers and a host name of its own: neither host can look at the other's processes.
ANOTHER_HOST = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture(autouse=True)
def fast_beats(monkeypatch):
    monkeypatch.setenv("MUONLAB_BEAT", "0.3")


@pytest.fixture
def gate(tmp_path):
    """The file that holds the runs of `workers` within a step until it is removed; see gate.py."""
    path = tmp_path / "gate"
    path.write_text("12")
    return path


@pytest.fixture
def workers(gate):
    """workers(study, *before) -> a process of muonlab.worker; killed at the end with all that it started."""
    begun = []

    def start(study, *before):
        worker = ["-m", "muonlab.worker", str(study.folder), "--workers", "1"]
        process = subprocess.Popen(
            [*before, sys.executable, gate_file, str(gate), *worker],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)],
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def writer(folder):
    """The process that writes some run under `folder`, once one has begun."""
    for _ in range(3000):
        for path in folder.glob("runs/[!.]*"):
            if (lease := held(path)) and lease.owner:
                return lease.owner.pid
        time.sleep(0.01)
    raise AssertionError("no run began")


def attempts_of(made, slots=None):
    queue = Queue(open_storage(made.storage, made.folder), made.name, made.design)
    return queue.attempts(slots or made.slots())


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_run_whose_parent_was_killed_is_waited_for_and_its_result_taken(
    study, tmp_path, workers, gate, monkeypatch
):
    made = study(ONE)
    made.save()
    parent = workers(made)
    writer(tmp_path)
    parent.kill()
    parent.wait()
    lines = []

    def say(line):
        lines.append(line)
        if line.startswith("waiting"):
            gate.unlink()

    monkeypatch.setattr(Pool, "say", staticmethod(say))
    [(slot, _)] = train_study(made)[0]
    assert re.search(r"waiting for one/adamw/s1 \(.* is still being written by process \d+ on ", lines[0])
    assert len(lines) == 1
    status = json.loads((run_folder(slot.config) / "status.json").read_text())
    assert (status["status"], len(status["sessions"])) == ("finished", 1)
    assert [(attempt.state, attempt.status) for attempt in attempts_of(made)] == [("COMPLETE", "finished")]
    log = (made.folder / "logs" / "one-adamw-s1.log").read_text()
    assert "Traceback" not in log


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_worker_that_is_asked_to_stop_takes_its_run_with_it(study, tmp_path, workers, name, code):
    made = study(ONE)
    made.save()
    parent = workers(made)
    run = writer(tmp_path)
    parent.send_signal(signal.Signals[name])
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == code, err
    assert err.rstrip().endswith("muonlab: stopped; rerun the same command to resume")
    assert "Traceback" not in err
    assert process_start(run) is None
    [slot] = made.slots()
    assert load_run(run_folder(slot.config)).status == "interrupted"
    assert [(attempt.state, attempt.status) for attempt in attempts_of(made)] == [("FAIL", "interrupted")]


def test_an_interruption_while_a_run_starts_is_no_failure(study, tmp_path, workers):
    """The signal reaches the whole group, as from a terminal, while the fork server still imports."""
    made = study(ONE)
    made.save()
    parent = workers(made)
    while not (made.folder / "logs").exists():  # made when the first run is to be started
        time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGINT)
    os.killpg(parent.pid, signal.SIGINT)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 130, err
    assert "Traceback" not in err
    assert all(attempt.status in ("", "interrupted") for attempt in attempts_of(made))
    assert help_with(made) == 0


@pytest.mark.parametrize("victims", ["fork server", "fork server and run"])
def test_a_fork_server_that_is_killed_is_made_anew(study, tmp_path, workers, gate, victims):
    made = study(ONE | {"two": {"arms": {"muon": ["optimizer=muon"]}, "seeds": [1]}})
    made.save()
    parent = workers(made)
    run = writer(tmp_path)
    os.kill(parent_of(run), signal.SIGKILL)
    if victims == "fork server and run":
        os.kill(run, signal.SIGKILL)
    gate.unlink()
    out, err = parent.communicate(timeout=120)
    assert (parent.returncode, "Traceback" in out + err) == (0, False), out + err
    states = [attempt.state for attempt in attempts_of(made)]
    assert states.count("COMPLETE") == 2
    assert states.count("FAIL") == (victims == "fork server and run")


def test_a_mistake_that_only_a_run_would_find_costs_no_slot(study, tmp_path):
    arms = {"adamw": ["optimizer=adamw"], "muon": ["optimizer=muon", "model.context=9999"]}
    made = study({"one": {"arms": arms, "vary": {"optimizer.lr": [0.1]}}})
    with pytest.raises(MuonlabError, match=r"one/muon/0\.1: .*context 9999 needs"):
        train_study(made)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "studies").exists()


@pytest.fixture
def looks(monkeypatch):
    """[(own beats before, own beats after, answer)] of every look at whether another worker lives."""
    whole, seen = Heartbeat.alive, []

    def alive(heartbeat, token):
        before = heartbeat._beats
        answer = whole(heartbeat, token)
        seen.append((before, heartbeat._beats, answer))
        return answer

    monkeypatch.setattr(Heartbeat, "alive", alive)
    return seen


@pytest.mark.parametrize("storage", ["journal", "postgres"])
def test_of_two_hosts_one_is_killed_and_the_other_ends_the_study(
    study, tmp_path, workers, gate, looks, storage, request, monkeypatch
):
    """The dead one's slot is open from the third heartbeat after the survivor first saw it, and not before."""
    if subprocess.run([*ANOTHER_HOST, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let a test make a host of its own (unshare)")
    if storage == "postgres":
        monkeypatch.setenv("MUONLAB_STORAGE", request.getfixturevalue("postgres").create("hosts"))
    plan = {"search": {"search": search(trials=2), "seeds": [0]}}
    made = study(plan, storage=storage_address(None))
    made.save()
    theirs = workers(made, *ANOTHER_HOST, "sh", "-c", 'hostname twin; exec "$@"', "sh")
    writer(tmp_path)
    os.killpg(theirs.pid, signal.SIGKILL)
    theirs.wait()
    gate.unlink()
    trained, _, _ = train_study(load_study(made.folder))
    slots = [slot for slot, _ in trained]
    attempts = attempts_of(made, slots)
    complete = [attempt.slot for attempt in attempts if attempt.state == "COMPLETE"]
    assert sorted(complete) == sorted(slot.name for slot in slots)
    assert "RUNNING" not in [attempt.state for attempt in attempts]
    [lost] = [attempt for attempt in attempts if attempt.cause == SILENT]
    assert (lost.state, lost.status) == ("FAIL", "killed")
    silent = 1 + SILENCE  # it is first seen at the first beat
    assert not any(alive for before, _, alive in looks if before >= silent)
    assert all(alive for _, after, alive in looks if after < silent)
    assert {alive for _, _, alive in looks} == {True, False}
    undisturbed, _, _ = train_study(study(plan, overrides=[f"paths.runs={tmp_path / 'alone'}"], name="alone"))
    for (slot, folder), (twin, alone) in zip(trained, undisturbed, strict=True):
        assert slot.name == twin.name
        ours, theirs = load_run(folder), load_run(alone)
        assert ours.metrics == theirs.metrics
        assert ours.steps["train_loss"].tolist() == theirs.steps["train_loss"].tolist()
