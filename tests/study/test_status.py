"""A study's status: every slot in one state, what is best, what runs, and what went wrong."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_designs import search

from muonlab.record import RunRecord
from muonlab.record.environment import Environment
from muonlab.study.queue import Queue
from muonlab.study.status import as_json, as_text, read_status
from muonlab.study.storage import open_storage
from muonlab.train.run import run_folder


@pytest.fixture
def opened(study):
    """(study, queue, slots) of a search over five settings whose best one is repeated."""
    made = study(
        {
            "search": {"search": search(trials=5), "seeds": [0]},
            "fresh": {"arms": {"muon": ["optimizer=muon"]}, "tuned_on": "search"},
        }
    )
    made.save()
    return made, Queue(open_storage(None, made.folder), made.name, made.design), made.slots()


def write(slot, steps, status=None):
    """A record with made-up losses and max logits, over or not."""
    record = RunRecord.create(run_folder(slot.config), slot.config.as_dict(), [], Environment(host="made up"))
    for step in range(steps):
        logits = torch.tensor([[1.0, 2.0 + step]])
        record.append(step, {"train_loss": 3.0 - 0.1 * step}, {"max_logit": logits, "max_logit_abs": logits})
    record.flush()
    if status:
        record.finish(status, metrics={"val_loss": 2.0})
    return record


def test_a_study_that_has_not_begun_waits(opened):
    made, _, slots = opened
    status = read_status(made)
    assert (status.slots, status.waiting) == (len(slots), 5) == (5, 5)
    assert (status.done, status.running, status.failed) == (0, 0, 0)
    assert status.later == ("fresh",)
    assert status.best == status.live == status.faults == ()


def test_every_slot_is_in_one_state_and_the_best_and_the_faults_are_named(opened):
    made, queue, slots = opened
    done, worse, live, broken = map(queue.claim, slots[:4])
    for claim, loss in ((done, 2.0), (worse, 2.5)):
        write(claim.slot, claim.slot.config.trainer.max_steps, "finished")
        queue.finish(claim, "finished", "", loss)
    queue.finish(broken, "failed", "a bug", None)
    record = write(live.slot, 7)
    # The claims are this process's: another queue sees them as a living worker's.
    status = read_status(made)
    assert (status.done, status.running, status.waiting, status.failed) == (2, 1, 1, 1)
    [best] = status.best
    assert (best.arm, best.loss, best.slot, best.runs) == ("search/muon", 2.0, done.slot.name, 2)
    assert best.setting == done.slot.level.setting
    [run] = status.live
    assert (run.slot, run.step, run.steps) == (live.slot.name, 6, 40)
    assert run.loss == pytest.approx(2.4)
    assert run.max_logit == 8.0
    [fault] = status.faults
    assert (fault.slot, fault.status, fault.cause) == (broken.slot.name, "failed", "a bug")
    text = as_text(status)
    assert text.splitlines()[0] == "tiny: 2 of 5 runs done, 1 running, 1 waiting, 1 failed"
    assert f"running      {live.slot.name}: step 7 of 40, loss 2.4000, max logit 8" in text
    assert json.loads(as_json(status))["best"][0]["loss"] == 2.0
    record.finish("interrupted")


def test_infinite_values_are_text_in_json(opened):
    made, queue, slots = opened
    queue.finish(queue.claim(slots[0]), "diverged", "", float("inf"))
    assert json.loads(as_json(read_status(made)))["best"][0]["loss"] == "inf"


def test_the_command_prints_text_or_json_and_a_mistake_in_one_sentence(opened, tmp_path):
    made, *_ = opened
    command = [sys.executable, "-m", "muonlab.study.status"]
    done = subprocess.run(
        [*command, str(made.folder), "--json"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr, json.loads(done.stdout)["waiting"]) == (0, "", 5)
    wrong = subprocess.run([*command, "nowhere"], capture_output=True, text=True, cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("muonlab: no study in nowhere")
