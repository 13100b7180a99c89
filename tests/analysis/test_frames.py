"""Frames: what collect makes of run records, and what down-sampling keeps."""

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from analysis import frames as module
from analysis.columns import (
    COLUMNS,
    METRICS,
    RECORDED,
    SUMMARIES,
    at_end,
    axis_label,
    is_logarithmic,
    peak_step,
    settled_loss,
)
from analysis.frames import collect, downsample
from analysis.run_tests import apply_tests, collapsed
from muonlab.errors import MuonlabError


def test_one_row_per_run_in_the_order_of_the_folders(frames):
    assert frames.runs["arm"].tolist() == ["adamw", "adamw", "muon", "muon", "muonclip", "muonclip"]
    assert frames.runs["seed"].tolist() == [1, 2] * 3
    assert len(frames.steps) == 6 * 120
    assert len(frames.heads) == 6 * 120 * 4
    clip = frames.runs.iloc[4]
    assert (clip["tau"], clip["context"], clip["num_steps"], clip["tokens"]) == (30.0, 64, 120, 120 * 1024)
    assert math.isnan(frames.runs["tau"].iloc[0])


def test_a_list_of_folders_takes_the_optimizers_names_as_arms(runs, make_run):
    folders = runs(a=make_run("muon", 1), b=make_run("adamw", 1))
    assert collect(folders).runs["arm"].tolist() == ["muon", "adamw"]


def test_a_run_without_a_learning_rate_has_none_in_its_row(runs, make_run):
    run = make_run("muon", 1)
    del run.config["optimizer"]["lr"]
    run.steps["lr"] = math.nan
    frames = collect(runs(a=run))
    assert frames.runs["lr"].isna().all()
    assert apply_tests(frames)["name"].nunique() >= 4


def test_steps_carry_the_extremes_over_heads_and_the_runs_own_learning_rate(frames):
    heads = frames.heads[frames.heads["run"] == "muonclip-s1"]
    steps = frames.steps[frames.steps["run"] == "muonclip-s1"].set_index("step")
    for step in (0, 60, 119):
        there = heads[heads["step"] == step]
        assert steps.loc[step, "max_logit"] == there["value"].max()
        assert steps.loc[step, "gamma"] == there["gamma"].min()
    assert (steps["lr"] == 0.03).all()
    assert steps["scheduled_lr"].iloc[0] < 0.03
    assert steps["entropy"].notna().sum() == 24


def test_a_column_is_described_once(frames):
    for name, summary in SUMMARIES.items():
        assert summary.function.__doc__
        assert name in frames.runs
        assert METRICS[name] == summary.unit
        assert COLUMNS[name] == summary.column
    assert COLUMNS["val_loss"] == RECORDED["val_loss"], "a run's column has the axis of the recorded one"
    assert axis_label("svd_entropy/query") == "SVD entropy of the weights"
    assert axis_label("no_such_column") == "no such column"
    assert is_logarithmic("sigma_max/mlp (end)")
    assert not is_logarithmic("train_loss")


def test_spikes_are_counted_where_they_begin(frames):
    spikes = frames.steps[frames.steps["loss_spikes"] > 0]
    assert spikes["run"].tolist() == ["muon-s1", "muon-s2"]
    assert (spikes["step"] == 60).all()
    assert frames.steps["grad_spikes"].sum() == 0


def test_a_diverged_run_has_no_final_loss_and_counts_with_its_first(frames):
    run = frames.runs[frames.runs["run"] == "muon-s2"].iloc[0]
    assert math.isnan(run["val_loss"])
    assert run["loss"] == run["initial_loss"] > 5
    assert run["cause"] == "the loss is not finite"


def test_recorded_metrics_win_over_the_last_reading(runs, make_run):
    run = make_run("muon", 1)
    run.metrics = {"val_loss": 1.5, "val_bits_per_byte": 2.2}
    row = collect(runs(a=run)).runs.iloc[0]
    assert (row["val_loss"], row["val_bits_per_byte"], row["loss"]) == (1.5, 2.2, 1.5)
    assert row["probe_loss"] == run.steps["probe_loss"].dropna().iloc[-1]


@pytest.mark.parametrize(
    ("val_loss", "status", "counted"),
    [
        (2.0, "finished", 2.0),
        (9.0, "finished", 5.5),
        (math.inf, "finished", 5.5),
        (math.nan, "diverged", 5.5),
        (math.nan, "out-of-memory", 5.5),
        (math.nan, "interrupted", math.nan),
    ],
)
def test_settled_loss(val_loss, status, counted):
    assert settled_loss(val_loss, 5.5, status) == pytest.approx(counted, nan_ok=True)


def test_warmup_ends_where_the_rate_first_peaks(frames):
    steps = frames.steps[frames.steps["run"] == "muon-s1"]
    assert peak_step(steps["step"], steps["scheduled_lr"]) == frames.runs["warmup_steps"].iloc[2] == 11
    assert math.isnan(peak_step(steps["step"], steps["scheduled_lr"] * np.nan))


def test_at_end_is_the_median_of_the_last_twentieth(frames):
    steps = frames.steps[frames.steps["run"] == "muon-s1"]
    assert at_end(steps["max_logit"]) == steps["max_logit"].tail(6).median()
    assert at_end(steps["probe_loss"]) == steps["probe_loss"].iloc[[115, 119]].median()


def test_downsampling_keeps_peaks_means_and_counts(frames):
    steps = frames.steps
    thin = downsample(steps, points=40)
    assert thin.groupby("run").size().eq(40).all()
    assert thin["loss_spikes"].sum() == steps["loss_spikes"].sum()
    for run, part in steps.groupby("run"):
        kept = thin[thin["run"] == run]
        assert kept["max_logit"].max() == part["max_logit"].max()
        assert kept["grad_norm"].max() == part["grad_norm"].max()
        assert kept["gamma"].min() == part["gamma"].min()
        assert kept["train_loss"].iloc[0] == pytest.approx(part["train_loss"].iloc[:3].mean())
        assert kept["step"].tolist() == list(range(2, 120, 3))
    assert downsample(steps, points=120).equals(steps)


def test_downsampling_keeps_conditions_apart(frames):
    part = frames.steps[frames.steps["run"] == "muon-s1"]
    twice = pd.concat([part.assign(condition="a"), part.assign(condition="b")])
    assert downsample(twice, points=40).groupby("condition").size().tolist() == [40, 40]


def test_no_run_at_all_is_refused():
    with pytest.raises(MuonlabError, match="no run folder"):
        collect([])


def test_analysis_starts_without_torch_or_pyplot():
    heavy = "{'torch', 'lightning', 'mlflow', 'optuna', 'hydra', 'matplotlib.pyplot'}"
    command = (
        f"import sys, analysis.redraw, analysis.run_tests, analysis.tables; print({heavy} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_heads_of_a_long_run_are_thinned_and_nothing_else_changes(runs, make_run, monkeypatch):
    run = make_run("muonclip", 1)
    whole = collect(runs(whole=run))
    monkeypatch.setattr(module, "HEAD_STEPS", 50)
    long = collect(runs(whole=run))
    pd.testing.assert_frame_equal(long.runs, whole.runs, check_exact=True)
    pd.testing.assert_frame_equal(long.steps, whole.steps, check_exact=True)

    width = math.ceil(len(run.steps) / 50)
    assert len(long.heads) == math.ceil(len(run.steps) / width) * 4
    assert width > 1
    of_bins = whole.heads.groupby([whole.heads["step"] // width * width, "layer", "head"])
    kept = long.heads.set_index(["step", "layer", "head"])
    for column, rule in {"value": "max", "gamma": "min", "entropy": "last"}.items():
        np.testing.assert_array_equal(kept[column], of_bins[column].agg(rule))
    assert collapsed(long.heads, 64) == collapsed(whole.heads, 64)
