"""What results/ keeps: enough to redraw every figure to the same bytes, and to answer every claim."""

import json
import time
from dataclasses import replace

import pandas as pd
import pytest
import yaml

from analysis.answers import answer_all
from analysis.archive import TESTS, load_frames, read_table, save_frames, save_outcomes
from analysis.claims import read_claim
from analysis.figures import read_figure
from analysis.frames import stack
from analysis.redraw import redraw
from analysis.run_tests import apply_tests
from muonlab.errors import MuonlabError

FIGURES = [
    {"name": "traces", "kind": "traces", "conditions": ["raised"], "arms": ["muon", "muonclip"], "tau": 30},
    {"name": "stable", "kind": "spike_vs_stable", "conditions": ["raised"], "tau": 30},
    {"name": "rates", "kind": "lr_sensitivity"},
    {"name": "polynomials", "kind": "polynomials", "table": "curves.csv"},
    {
        "name": "switch",
        "kind": "switch",
        "conditions": ["raised"],
        "tau": 30,
    },
]


@pytest.fixture
def stacked(long_frames):
    return stack({"raised": long_frames})


def test_every_kind_of_figure_is_redrawn_to_the_same_bytes(stacked, tmp_path):
    save_frames(stacked, tmp_path)
    conditions = {"raised": {"windows": [[0, 100], [200, 400]]}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump({"figures": FIGURES, "conditions": conditions}))
    x = [0.01, 0.1, 1.0]
    curve = {"steps": 5, "x": x, "y": [0.5, 1.0, 1.1]}
    curves = [
        pd.DataFrame({"panel": p, "schedule": s} | curve) for p, s in (("whole", "jordan"), ("small", "you"))
    ]
    pd.concat(curves).to_csv(tmp_path / "curves.csv", index=False)
    (tmp_path / "made.json").write_text(
        json.dumps({"command": "make it", "commit": "0123456789ab", "dirty": False})
    )
    first = {path: path.read_bytes() for path in redraw(tmp_path)}
    assert len(first) == 5
    for path in first:
        path.with_suffix(".csv").unlink()
    assert {path: path.read_bytes() for path in redraw(tmp_path)} == first
    for path in first:
        assert len(pd.read_csv(path.with_suffix(".csv"))) > 0
        assert b"make it (commit 012345678)" in path.read_bytes()


def test_kept_frames_lose_no_run_and_no_peak(stacked, tmp_path):
    save_frames(stacked, tmp_path)
    kept = load_frames(tmp_path)
    assert kept.runs["run"].tolist() == stacked.runs["run"].tolist()
    assert "folder" not in kept.runs
    events = pd.read_parquet(tmp_path / "events.parquet")
    assert len(events) == len(stacked.events) > 0
    assert {"condition", "arm", "seed", "step", "series", "definition"} <= set(events)
    for column in ("max_logit", "grad_norm"):
        peaks = [frames.steps.groupby("run")[column].max() for frames in (kept, stacked)]
        pd.testing.assert_series_equal(*peaks, rtol=1e-6, check_dtype=False)


def test_the_file_of_many_runs_stays_small_and_keeps_rare_readings(stacked, tmp_path, monkeypatch):
    steps = stacked.steps.assign(level=stacked.steps["arm"])
    steps["svd_entropy/query"] = steps["probe_loss"].where(steps["step"] % 100 == 0)
    steps["level"] = steps["level"].astype(object).where(steps["arm"] != "adamw", 0.01)
    frames = replace(stacked, steps=steps)
    save_frames(frames, tmp_path)
    whole = (tmp_path / "steps.parquet").stat().st_size
    monkeypatch.setattr("analysis.archive.STEPS_BYTES", whole // 2)
    save_frames(frames, tmp_path)
    assert (tmp_path / "steps.parquet").stat().st_size <= whole // 2
    kept = load_frames(tmp_path).steps
    assert kept["svd_entropy/query"].count() == 4 * kept["run"].nunique()
    assert set(kept["level"]) == {"0.01", "muon", "muonclip"}
    monkeypatch.setattr("analysis.archive.STEPS_BYTES", 0)
    save_frames(frames, tmp_path)
    assert load_frames(tmp_path).steps.groupby("run").size().between(50, 60).all(), "never fewer than that"


def test_outcomes_are_read_as_they_were_and_their_bytes_do_not_depend_on_the_time(tmp_path, monkeypatch):
    outcomes = pd.DataFrame(
        {
            "run": ["a", "b"],
            "holds": [True, float("nan")],
            "value": [1.5, float("nan")],
            "level": ["0.1", "0.2 0.3"],
        }
    )
    written = []
    for second in (1, 1_000_000):
        monkeypatch.setattr(time, "time", lambda second=second: float(second))
        save_outcomes(outcomes, tmp_path)
        written.append((tmp_path / TESTS).read_bytes())
    assert written[0] == written[1]
    pd.testing.assert_frame_equal(read_table(tmp_path / TESTS), outcomes)


def test_the_traces_of_single_heads_are_kept_with_their_peaks(stacked, tmp_path):
    heads = stacked.heads
    save_frames(stacked, tmp_path)
    kept = load_frames(tmp_path).heads
    assert kept["step"].nunique() == 200
    keys = ["arm", "run", "layer", "head"]
    for column, extreme in (("value", "max"), ("gamma", "min")):
        peaks = [table.groupby(keys)[column].agg(extreme) for table in (kept, heads)]
        pd.testing.assert_series_equal(*peaks, rtol=1e-6, check_dtype=False)


def test_a_choice_keeps_the_order_of_its_arms_and_may_not_be_empty(stacked):
    chosen = stacked.select(["raised"], ["muonclip", "adamw"])
    assert list(dict.fromkeys(chosen.runs["arm"])) == ["muonclip", "adamw"]
    assert set(chosen.steps["arm"]) == set(chosen.heads["arm"]) == {"muonclip", "adamw"}
    with pytest.raises(MuonlabError, match="no run of condition"):
        stacked.select(["calm"])


def test_an_unknown_kind_of_figure_is_refused():
    with pytest.raises(MuonlabError, match="did you mean 'switch'"):
        read_figure({"name": "x", "kind": "swich"})


@pytest.mark.parametrize("name", ["experiment.yaml", "made.json", "runs.csv", "steps.parquet"])
@pytest.mark.parametrize("damage", [None, b"", b"\xff\xfe\x00", b"[]"])
def test_damaged_results_are_one_sentence(stacked, tmp_path, name, damage):
    save_frames(stacked, tmp_path)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump({"figures": FIGURES[:1]}))
    (tmp_path / "made.json").write_text("{}")
    (tmp_path / name).unlink()
    if damage is not None:
        (tmp_path / name).write_bytes(damage)
    with pytest.raises(MuonlabError, match=rf"damaged|no experiment in .*: it has no {name}") as caught:
        redraw(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_experiment_is_reported(tmp_path):
    with pytest.raises(MuonlabError, match=r"it has no runs\.csv"):
        load_frames(tmp_path)


EXPLODED = {"control": {"arm": "muon", "test": "exploded"}}


@pytest.mark.parametrize(
    ("claim", "answer"),
    [
        ({"arm": "muonclip", "test": "capped", "expect": True}, "unresolved"),  # three of three
        ({"arm": "muonclip", "test": "exploded", "expect": True}, "not seen here"),
        ({"arm": "muonclip", "test": "exploded", "expect": False} | EXPLODED, "unresolved"),
        ({"arm": "adamw", "test": "capped", "expect": True}, "not testable"),
        ({"arm": "muonclip", "baseline": "muon", "metric": "max_logit", "expect": "lower"}, "reproduced"),
        (
            {"arm": "muonclip", "baseline": "muon", "metric": "max_logit", "expect": "lower"} | EXPLODED,
            "not testable",  # its control exploded in one seed alone
        ),
        ({"arm": "muonclip", "baseline": "muon", "metric": "max_logit", "expect": "higher"}, "contradicted"),
        (
            {
                "arm": "muonclip",
                "baseline": "muon",
                "metric": "max_logit",
                "expect": "lower",
                "at_least": 1e9,
            },
            "contradicted",
        ),
        ({"arm": "muon", "metric": "max_logit", "above": 300}, "reproduced"),
        ({"arm": "muonclip", "metric": "max_logit", "above": 300}, "contradicted"),
        ({"arm": "muonclip", "metric": "max_logit", "above": 3, "below": 45}, "reproduced"),
        ({"arm": "muonclip", "baseline": "muonclip", "metric": "loss", "expect": "lower"}, "not testable"),
    ],
)
def test_claims_are_answered_by_the_runs(stacked, claim, answer):
    every_tau = replace(stacked, runs=stacked.runs.assign(tau=30.0))
    outcomes = apply_tests(every_tau).assign(condition="raised")
    asked = read_claim(
        {"claim": "c", "source": "s", "condition": "raised"} | claim,
        {"raised": ["adamw", "muon", "muonclip"]},
    )
    [row] = answer_all([asked], stacked, outcomes)
    assert row.answer == answer
    assert row.n == (1 if "control" in claim else 3)
