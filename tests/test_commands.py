"""The commands as a user types them: what they print, where, and the exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(module, *arguments, cwd):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=300, stdin=subprocess.DEVNULL
    )


def test_a_run_ends_with_its_folder_and_divergence_with_a_sentence(tmp_path, tiny_overrides):
    done = run("muonlab.train", *tiny_overrides, "optimizer=muon", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    folder = done.stdout.splitlines()[-1].removeprefix("run: ")
    assert (tmp_path / folder / "config.yaml").exists()

    diverging = ["optimizer=adamw", "optimizer.lr=1e30", "schedule.warmup=0"]
    lost = run("muonlab.train", *tiny_overrides, *diverging, cwd=tmp_path)
    assert lost.returncode == 3
    assert lost.stderr.startswith("diverged: the loss is nan at step")
    assert lost.stdout.splitlines()[-1].startswith("run: ")


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("muonlab.train", ["optimizer=moun"], "did you mean 'muon'"),
        ("muonlab.train", ["optimizer.tau=-1"], "optimizer.tau must be a finite number above 0, not -1"),
        ("muonlab.train", ["--hlp"], "--help lists what there is"),
        ("muonlab.train", ["paths.runs=/proc/nowhere", "data=synthetic", "tracking=none"], "/proc/nowhere"),
        ("muonlab.train", ["tracking.uri=ftp://x", "data=synthetic"], "ftp://x"),
        ("muonlab.sweep", ["search.trial=3"], "did you mean 'search.trials'"),
        ("muonlab.worker", ["nowhere"], "no study in nowhere"),
        ("muonlab.worker", [".", "--workers", "0"], "--workers must be a whole number of at least 1"),
        ("muonlab.experiment", ["ablatio"], "did you mean 'ablation'"),
        ("muonlab.record", ["nowhere"], "no run in nowhere"),
        ("muonlab.data", ["shakespear"], "did you mean 'shakespeare'"),
        ("analysis.evidence", ["nowhere"], "no experiment is kept in nowhere"),
        ("analysis.redraw", ["nowhere"], "no experiment is kept in nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_failing_exit_code(module, arguments, message, tmp_path):
    done = run(module, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_help_lists_groups_and_cfg_prints_the_composed_config(tmp_path):
    shown = run("muonlab.train", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert ", muon, " in shown.stdout
    printed = run("muonlab.train", "--cfg", "job", "optimizer.tau=7", cwd=tmp_path)
    assert "tau: 7" in printed.stdout
    assert not list(tmp_path.iterdir())


def test_a_multirun_runs_every_combination_and_outlives_a_mistake(tmp_path, tiny_overrides):
    swept = ["seed=1,2", "optimizer=muonclip", "optimizer.tau=30,-1"]
    done = run("muonlab.train", "-m", *tiny_overrides, *swept, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.count("run: ") == 2
    assert done.stderr.splitlines() == [
        "muonlab: optimizer.tau must be a finite number above 0, not -1",
        "muonlab: 2 of 4 jobs could not be run",
    ]


def test_make_help_lists_the_targets():
    done = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True)
    targets = (
        "setup",
        "data",
        "smoke",
        "sweep",
        "ablation",
        "evidence",
        "figures",
        "report",
        "ui",
        "test",
        "lint",
    )
    for target in (*targets, "clean"):
        assert f"make {target} " in done.stdout
