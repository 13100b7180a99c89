"""Verdicts of whole frames, and how they are summed up and printed."""

import pytest

from analysis.frames import collect
from analysis.judge import judge_harmless, judge_runs, judge_switch, summarise
from analysis.tables import verdict_table


def held(table, arm, name):
    rows = table[(table["arm"] == arm) & (table["name"] == name)]
    return [*rows["holds"]]


def test_every_arm_is_judged_seed_by_seed(long_frames):
    verdicts = judge_runs(long_frames, tau=30.0)
    assert held(verdicts, "muonclip", "capped") == [True] * 3
    assert held(verdicts, "muon", "capped") == [False] * 3
    assert held(verdicts, "adamw", "capped") == [None] * 3
    assert held(verdicts, "muon", "collapsed") == [True] * 3
    assert held(verdicts, "adamw", "collapsed") == [False] * 3
    assert held(verdicts, "muon", "diverged") == [False] * 3
    assert not (
        set(judge_runs(long_frames)["arm"][judge_runs(long_frames)["name"] == "capped"]) - {"muonclip"}
    )


def test_summary_counts_what_could_not_be_judged(long_frames):
    summary = summarise(judge_runs(long_frames, tau=30.0)).set_index(["arm", "name"])
    assert summary.loc[("muonclip", "capped"), ["held", "judged", "runs"]].tolist() == [3, 3, 3]
    assert summary.loc[("adamw", "capped"), ["held", "judged", "runs"]].tolist() == [0, 0, 3]
    assert summary.loc[("muon", "capped"), "value"] < 0.5


def test_verdict_table_shows_counts_and_medians_in_a_fixed_order(long_frames):
    table = verdict_table(summarise(judge_runs(long_frames, tau=30.0)))
    assert list(table.columns) == [
        "arm", "lr", "exploded", "capped", "bounded", "recovered", "collapsed", "spiked", "diverged",
    ]  # fmt: skip
    assert table["arm"].tolist() == ["AdamW", "Muon", "MuonClip"]
    assert table["capped"].tolist()[0] == "-"
    assert table["capped"].tolist()[2] == "3/3 (1)"


def test_levels_are_summed_up_apart(long_frames):
    verdicts = judge_runs(long_frames).assign(level=lambda table: table["seed"] * 10.0)
    table = verdict_table(summarise(verdicts))
    assert table["level"].tolist() == ["10", "20", "30"] * 3
    assert table["collapsed"].tolist()[3] == "1/1 (1)"


def test_the_switch_is_judged_where_the_clip_goes_off_and_on(runs, make_run):
    folders = [
        folder
        for seed in (1, 2)
        for folder in runs(**{f"s{seed}": make_run("muonclip", seed, num_steps=600, off=(300, 450))})
    ]
    verdicts = judge_switch(collect(folders), windows=[(0, 300), (450, 600)])
    assert verdicts["name"].tolist() == ["climbs", "falls"] * 2
    assert verdicts["holds"].tolist() == [True] * 4
    never_off = judge_switch(collect(folders), windows=[(0, 600)])
    assert never_off.empty


def test_harmless_pairs_the_seeds_of_two_arms(long_frames):
    verdict = judge_harmless(long_frames.runs, "muonclip", "muon")
    ours, theirs = (
        long_frames.runs[long_frames.runs["arm"] == arm].set_index("seed")["loss"]
        for arm in ("muonclip", "muon")
    )
    assert verdict.value == pytest.approx((ours - theirs).mean())
    assert judge_harmless(long_frames.runs, "adamw", "muon").holds is None, "AdamW has no clip that acted"
    one_less = long_frames.runs[(long_frames.runs["arm"] != "muon") | (long_frames.runs["seed"] != 3)]
    assert judge_harmless(one_less, "muonclip", "muon").holds is None, "two pairs are too few"
