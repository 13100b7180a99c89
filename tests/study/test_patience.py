"""What the machine refuses is no result: slots wait, with growing pauses, and the study ends in one sentence."""

import pytest
from tiny_designs import search

from muonlab.errors import EnvironmentFault
from muonlab.study import patience as patience_module
from muonlab.study.patience import Patience
from muonlab.study.pool import Result
from muonlab.study.queue import Queue
from muonlab.study.run import missing_text
from muonlab.study.storage import open_storage
from muonlab.study.work import Worker
from muonlab.train.run import train


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_pauses_grow_to_a_minute_and_begin_anew_when_a_run_ends_well():
    clock, lines = Clock(), []
    patience = Patience(lines.append, clock)
    pauses = []
    for _ in range(8):
        patience.fault("the disk is full")
        pauses.append(patience.pause)
        clock.now += patience.pause
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(lines) == 1, "a cause is said once"
    patience.fault("the server is gone")
    assert len(lines) == 2
    patience.well()
    assert patience.pause == 0
    patience.fault("the disk is full")
    assert patience.pause == 1


def test_what_fails_during_a_pause_began_before_it():
    clock = Clock()
    patience = Patience(lambda line: None, clock)
    for _ in range(20):
        patience.fault("the disk is full")
    assert patience.pause == 1
    assert patience.end == ""


def test_patience_ends():
    clock = Clock()
    patience = Patience(lambda line: None, clock)
    for _ in range(patience_module.PAUSES):
        assert patience.end == ""
        patience.fault("the disk is full")
        clock.now += patience.pause
    assert "10 tries" in patience.end


class ScriptedPool:
    """A pool in this process: `script` gives the result of each attempt, None for a run that is trained."""

    def __init__(self, folder, script):
        self.log_folder, self.script, self.lines = folder, script, []

    def say(self, line):
        self.lines.append(line)

    def run(self, next_job, on_result, title, total_jobs, total_steps, stands):
        ended = 0
        while (job := next_job()) is not None:
            result = self.script(job)
            if result is None:
                outcome = train(job.config)
                result = Result(outcome.status, outcome.cause, outcome.folder)
            on_result(job, result)
            ended += 1
        return ended


@pytest.fixture
def scripted(study, tmp_path, monkeypatch):
    """scripted(script, trials) -> (worker, slots, pool)."""
    monkeypatch.setattr(patience_module, "FIRST", 1e-3)
    monkeypatch.setenv("MUONLAB_BEAT", "0.01")

    def make(script, trials=2):
        made = study(
            {"search": {"search": search(trials=trials), "seeds": [0]}}, overrides=["trainer.max_steps=2"]
        )
        made.save()
        pool = ScriptedPool(tmp_path, script)
        queue = Queue(open_storage(None, made.folder), made.name, made.design)
        return Worker(queue, pool), made.slots(), pool

    return make


@pytest.mark.parametrize("status", ["environment", "interrupted"])
def test_faults_and_interruptions_never_count(scripted, status):
    left = [4]

    def script(job):
        left[0] -= 1
        return Result(status, "the store is locked") if left[0] >= 0 else None

    worker, slots, pool = scripted(script)
    assert worker.run(slots, "search", wait=True) == []
    states = [attempt.state for attempt in worker.queue.attempts(slots)]
    assert (states.count("FAIL"), states.count("COMPLETE")) == (4, 2)
    said = [line for line in pool.lines if line.startswith("waiting")]
    assert len(said) == (status == "environment")


def test_a_machine_that_stays_out_of_order_ends_the_command_and_fails_nothing_for_good(scripted, monkeypatch):
    monkeypatch.setattr(patience_module, "PAUSES", 3)
    worker, slots, _ = scripted(lambda job: Result("environment", "the disk is full"))
    missing = worker.run(slots, "search", wait=True)
    text = missing_text(missing, 2, worker.patience.end)
    assert text.startswith(
        "2 of 2 runs are missing, so there are no conclusions (nothing succeeded in 3 tries"
    )
    assert "rerun the same command" in text
    assert text.count("the disk is full") == 1
    worker, slots, _ = scripted(lambda job: None)
    assert worker.run(slots, "search", wait=True) == []


def test_three_equal_failures_in_a_row_stop_the_study(scripted):
    worker, slots, pool = scripted(lambda job: Result("failed", "TypeError: no such argument"), trials=6)
    missing = worker.run(slots, "search", wait=True)
    assert len(missing) == 6
    assert sum("failed: TypeError" in line for line in pool.lines) == 3
    text = missing_text(missing, 6, worker.patience.end)
    assert "3 runs in a row failed in the same way" in text
    assert text.count("TypeError") == 3, "each with its log"
    assert "not run yet" in text


def test_a_run_that_is_killed_again_and_again_is_left_while_the_others_continue(scripted):
    worker, slots, _ = scripted(
        lambda job: Result("killed", "SIGKILL") if job.label == "search-muon-1-s0" else None, trials=3
    )
    [missing] = worker.run(slots, "search", wait=True)
    assert missing.slot.name == "search/muon/1/s0"
    assert missing.cause.endswith("search-muon-1-s0.log")
    killed = [attempt for attempt in worker.queue.attempts(slots) if attempt.status == "killed"]
    assert len(killed) == patience_module.KILLS


def test_a_result_that_the_storage_refuses_is_recorded_later(scripted, monkeypatch):
    refused, whole = [], Queue.finish

    def finish(queue, *arguments):
        if len(refused) < 2:
            refused.append(arguments)
            raise EnvironmentFault("the study's storage is locked")
        return whole(queue, *arguments)

    monkeypatch.setattr(Queue, "finish", finish)
    worker, slots, _ = scripted(lambda job: None)
    assert worker.run(slots, "search", wait=True) == []
    assert [attempt.state for attempt in worker.queue.attempts(slots)] == ["COMPLETE"] * 2
