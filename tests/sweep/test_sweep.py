"""A whole sweep: search, kill, interruption, replication, report."""

import json
import os
import signal
import threading
from contextlib import contextmanager

import pandas as pd
import pytest

from muonlab.errors import MuonlabError
from muonlab.sweep.__main__ import sweep
from muonlab.sweep.plan import load_plan, make_plan
from muonlab.sweep.pool import Job, Pool
from muonlab.sweep.search import open_studies, search

# A sweep's trainer has no progress bar and no smoke; its config has no single seed.
SWEEP = [
    "search.trials=2",
    "search.replicate_seeds=[1,2]",
    "search.workers=2",
    "~search.optimizers.adamw",
]


@pytest.fixture
def plan(tiny, tmp_path):
    def make(*overrides):
        return make_plan(
            tiny(*SWEEP, f"paths.studies={tmp_path / 'studies'}", *overrides, config_name="sweep")
        )

    return make


@contextmanager
def once_a_run_has_begun(folder, act):
    """Call act(pid) from a thread as soon as some run under `folder` has begun its record."""
    over = threading.Event()

    def watch():
        while not over.wait(0.01):
            for path in folder.glob("runs/*/status.json"):
                act(json.loads(path.read_text())["sessions"][0]["pid"])
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_sweep_survives_a_killed_trial_and_ends_with_the_full_number(plan, tmp_path, capsys):
    chosen = plan("trainer.max_steps=40")
    with once_a_run_has_begun(tmp_path, lambda pid: os.kill(pid, signal.SIGKILL)):
        assert sweep(chosen) == 0
    printed = capsys.readouterr().out
    assert "SIGKILL; waits to be run again" in printed
    trials = pd.read_csv(chosen.folder / "trials.csv")
    assert (trials["state"] == "FAIL").sum() == 1
    assert trials[trials["state"] == "COMPLETE"].groupby("optimizer").size().to_dict() == {
        "muon": 2,
        "muonclip": 2,
    }
    assert "MuonClip" in printed
    assert (chosen.folder / "figures" / "spike-vs-stable.png").exists()

    assert sweep(plan("trainer.max_steps=40")) == 0
    again = capsys.readouterr().out
    assert "is complete: 4 trials" in again
    assert "MuonClip" in again


def test_an_interrupted_search_goes_on_to_the_same_total(plan, tmp_path):
    chosen = plan("trainer.max_steps=200")
    studies = open_studies(chosen)
    interrupt = once_a_run_has_begun(tmp_path, lambda _: os.kill(os.getpid(), signal.SIGINT))
    pool = Pool(2, tmp_path / "logs")
    with pytest.raises(KeyboardInterrupt), interrupt:
        search(chosen, studies, pool, None)
    assert sum(len(s.counted()) for s in studies) < 4
    assert not pool.running

    studies = open_studies(load_plan(chosen.folder))
    search(chosen, studies, Pool(2, tmp_path / "logs"), None)
    assert [len(s.counted()) for s in studies] == [2, 2]


def test_a_diverged_and_a_failing_run_are_results(tiny, tmp_path):
    diverging = tiny("optimizer=adamw", "optimizer.lr=1e30", "schedule.warmup=0")
    wrong = tiny("optimizer.tau=-1")
    jobs, results = iter([Job(diverging, "diverging"), Job(wrong, "wrong")]), {}
    Pool(2, tmp_path / "logs").run(
        lambda: next(jobs, None), lambda job, result: results.update({job.label: result}), "test", 2, 24
    )
    assert results["diverging"].status == "diverged"
    assert results["wrong"].status == "failed"
    assert "tau is -1" in results["wrong"].cause


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.trials=0"], "at least 1"),
        (["search.seed=1"], "never enters a claim"),
        (["~search.optimizers.muon.space.weight_decay"], "equal search effort"),
        (["+search.optimizers.muon.space.momentun='choice(1)'"], "did you mean 'momentum'"),
        (["+search.optimizers.moun={published: {}, space: {}}"], "did you mean 'muon'"),
    ],
)
def test_an_unfair_or_misspelt_plan_is_refused(plan, overrides, message):
    with pytest.raises(MuonlabError) as caught:
        plan(*overrides)
    assert message in str(caught.value)


def test_a_study_keeps_its_config(plan):
    plan("study=mine").save()
    with pytest.raises(MuonlabError, match=r"study mine was made with another trainer \(max_steps\)"):
        plan("study=mine", "trainer.max_steps=99")
    assert plan("study=mine", "search.trials=5").name == "mine"
    assert plan().name != plan("trainer.max_steps=99").name
