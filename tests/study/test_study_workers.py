"""Workers that die or help, and what a study's folder is refused for."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
from gate import carry_out, pass_gate
from tiny_designs import SPACE, search

from muonlab.errors import MuonlabError
from muonlab.record import load_run
from muonlab.record.mlflow_link import Link
from muonlab.record.owner import Owner, machine
from muonlab.record.store import connect, store_uri
from muonlab.study import pool
from muonlab.study.pool import Pool
from muonlab.study.queue import Queue
from muonlab.study.run import train_study
from muonlab.study.storage import open_storage
from muonlab.study.study import load_study
from muonlab.train.config import TrackingSettings
from muonlab.train.run import run_folder, train
from muonlab.train.tracking import open_store, open_study_run
from muonlab.worker import main as worker


@contextmanager
def within_a_run(folder, act):
    """Call act(pid) from a thread for the first run under `folder` that has begun its record and cannot end before."""
    over, gate = threading.Event(), folder / "gate"
    gate.write_text("12")

    def watch():
        while not over.wait(0.01):
            for path in folder.glob("runs/*/status.json"):
                act(json.loads(path.read_text())["sessions"][0]["pid"])
                gate.unlink()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool, "carry_out", partial(carry_out, gate))
            yield
    finally:
        over.set()
        thread.join()


def searched(study, **others):
    return study(
        {"search": {"search": search(trials=2), "seeds": [0]}, "best": {"tuned_on": "search"}}, **others
    )


def test_a_killed_run_is_run_again_and_the_study_ends_whole(study, tmp_path, capsys):
    with within_a_run(tmp_path, lambda pid: os.kill(pid, signal.SIGKILL)):
        trained, _, queue = train_study(searched(study))
    assert "SIGKILL; will be run again" in capsys.readouterr().out
    slots = [slot for slot, _ in trained]
    states = [attempt.state for attempt in queue.attempts(slots)]
    assert (states.count("FAIL"), states.count("COMPLETE")) == (1, 4)


@pytest.mark.parametrize("sampler", ["quasi_random", "tpe"])
def test_an_interrupted_study_resumes_with_the_same_slots(study, tmp_path, sampler):
    optimizers = {
        name: {"published": {"lr": 0.02, "weight_decay": 0.1}, "space": SPACE} for name in ("adamw", "muon")
    }
    made = study(
        {
            "search": {"search": search(sampler, 2, **optimizers), "seeds": [0]},
            "best": {"tuned_on": "search"},
        },
    )
    interrupt = within_a_run(tmp_path, lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), interrupt:
        train_study(made)
    again = load_study(made.folder)
    trained, _, queue = train_study(again)
    assert len(trained) == 8
    complete = [a.slot for a in queue.attempts([slot for slot, _ in trained]) if a.state == "COMPLETE"]
    assert sorted(complete) == sorted(slot.name for slot, _ in trained)


def test_runs_that_the_queue_forgot_are_counted_and_damaged_ones_made_whole(study):
    """As after a power cut, which may take the last lines of a journal and the end of a file."""
    made = study({"search": {"search": search(trials=3), "seeds": [0]}})
    trained, _, _ = train_study(made)
    (made.folder / "journal.log").unlink()
    torn = trained[1][1] / "events.json"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:10])
    again, _, queue = train_study(made)
    assert [folder for _, folder in again] == [folder for _, folder in trained]
    assert torn.read_bytes() == whole
    attempts = queue.attempts([slot for slot, _ in again])
    assert [(a.slot, a.state) for a in attempts] == [(slot.name, "COMPLETE") for slot, _ in trained]


def test_a_worker_helps_with_any_study_until_none_is_left(study, monkeypatch, capsys):
    made = study({"one": {"arms": {"adamw": ["optimizer=adamw"]}}})
    made.save()
    study({"one": {"arms": {"adamw": ["optimizer=adamw"]}, "seeds": [1]}}, name="second").save()
    monkeypatch.setattr("sys.argv", ["muonlab.worker", str(made.folder.parent), "--workers", "2"])
    assert worker() == 0
    printed = capsys.readouterr().out
    assert "no open slot is left in tiny" in printed
    assert "no open slot is left in second" in printed
    trained, _, _ = train_study(made)
    assert "2 of 2 runs done" in capsys.readouterr().out
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no study in nowhere"),
        ([".", "--workers", "0"], "--workers must be a whole number of at least 1, not 0"),
        ([".", "--workers", "two"], "invalid int value"),
    ],
)
def test_a_worker_refuses_what_it_cannot_help_with(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["muonlab.worker", *arguments])
    with pytest.raises(MuonlabError, match=message):
        worker()


def test_a_search_keeps_what_it_is_made_of_and_not_its_hardware(study):
    searched(study).save()
    with pytest.raises(MuonlabError, match=r"created with a different trainer \(max_steps\)"):
        searched(study, overrides=["trainer.max_steps=99"]).save()
    searched(study, overrides=["trainer.num_threads=2", "trainer.progress=true"]).save()
    other = {"muon": {"published": {"lr": 0.02}, "space": {"lr": "interval(0.1, 1.0)"}}}
    with pytest.raises(MuonlabError, match=r"different search space of muon \(lr, weight_decay\)"):
        study({"search": {"search": search(trials=2, **other), "seeds": [0]}}).save()
    study({"search": {"search": search(trials=5), "seeds": [0]}, "best": {"tuned_on": "search"}}).save()


def test_a_study_folder_of_the_last_version_is_refused_with_what_to_do(study, tmp_path):
    made = searched(study)
    made.folder.mkdir(parents=True)
    (made.folder / "sweep.yaml").write_text("search: {}")
    with pytest.raises(MuonlabError, match=r"a study of muonlab 0\.1.*study=NAME, or move the folder away"):
        made.save()
    with pytest.raises(MuonlabError, match=r"made by muonlab 0\.1"):
        load_study(made.folder)


@pytest.mark.parametrize("text", ["", "name: x", "- 1", "name: [1"])
def test_a_damaged_study_file_is_one_sentence(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(MuonlabError) as caught:
        load_study(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_that_outlived_its_worker_is_waited_for_and_not_failed(study, tmp_path, monkeypatch):
    """The parent died alone: its run still writes, so the next command waits for it and takes its result."""
    made = study({"one": {"arms": {"adamw": ["optimizer=adamw"]}, "seeds": [1]}})
    [slot] = made.slots()
    folder = run_folder(slot.config)
    made.save()
    with monkeypatch.context() as patch:  # its worker took the slot, and is gone
        gone = Owner(socket.gethostname(), 2**22 + 1, 1, machine())
        patch.setattr(Owner, "this", classmethod(lambda cls: gone))
        patch.setattr(Owner, "alive", property(lambda owner: True))
        assert Queue(open_storage(None, made.folder), made.name, made.design).claim(slot)
    context = multiprocessing.get_context("fork")
    gate = tmp_path / "gate"
    gate.write_text("12")
    orphan = context.Process(target=lambda: train(slot.config, on_step=partial(pass_gate, gate)))
    orphan.start()
    while not (folder / "status.json").exists():
        time.sleep(0.05)
    monkeypatch.setattr(
        Pool, "say", staticmethod(lambda _: gate.unlink(missing_ok=True))
    )  # "waiting for ..."
    trained, _, queue = train_study(made)
    orphan.join(30)
    assert orphan.exitcode == 0
    assert [path for _, path in trained] == [folder]
    assert len(load_run(folder).steps) == 40
    assert len(json.loads((folder / "status.json").read_text())["sessions"]) == 1
    [attempt] = queue.attempts([slot])
    assert (attempt.state, attempt.status) == ("COMPLETE", "finished")


def open_at_once(barrier, tracking, runs, folder):
    barrier.wait()
    open_study_run(tracking, runs, "s", folder, {})


def test_two_openers_at_once_make_one_study_run_in_mlflow(tmp_path):
    tracking = TrackingSettings(name="mlflow", uri=None, experiment="e")
    open_store(tracking, tmp_path)
    folder = tmp_path / "study"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    openers = [
        context.Process(target=open_at_once, args=(barrier, tracking, tmp_path, folder)) for _ in range(2)
    ]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join(60)
        assert opener.exitcode == 0
    client = connect(store_uri(None, tmp_path))
    experiment = client.get_experiment_by_name("e").experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment])] == [Link.read(folder).run_id]
