"""Tests of all runs of some frames, and how their outcomes are summed up and printed."""

from dataclasses import replace

from analysis.frames import collect
from analysis.run_tests import apply_tests, summarise
from analysis.tables import outcome_table


def capped_frames(frames):
    """The frames as if every arm had the clip's threshold."""
    return replace(frames, runs=frames.runs.assign(tau=30.0))


def held(table, arm, name):
    rows = table[(table["arm"] == arm) & (table["name"] == name)]
    return [*rows["holds"]]


def test_every_arm_is_judged_seed_by_seed(long_frames):
    outcomes = apply_tests(capped_frames(long_frames))
    assert held(outcomes, "muonclip", "capped") == [True] * 3
    assert held(outcomes, "muon", "capped") == [False] * 3
    assert held(outcomes, "adamw", "capped") == [None] * 3
    assert held(outcomes, "muon", "collapsed") == [True] * 3
    assert held(outcomes, "adamw", "collapsed") == [False] * 3
    assert held(outcomes, "muon", "ended_above_start") == [False] * 3
    assert not (
        set(apply_tests(long_frames)["arm"][apply_tests(long_frames)["name"] == "capped"]) - {"muonclip"}
    )


def test_summary_counts_what_could_not_be_judged(long_frames):
    summary = summarise(apply_tests(capped_frames(long_frames))).set_index(["arm", "name"])
    assert summary.loc[("muonclip", "capped"), ["positive", "judged", "runs"]].tolist() == [3, 3, 3]
    assert summary.loc[("adamw", "capped"), ["positive", "judged", "runs"]].tolist() == [0, 0, 3]
    assert summary.loc[("muon", "capped"), "value"] < 0.5


def test_outcome_table_shows_counts_and_medians_in_a_fixed_order(long_frames):
    table = outcome_table(summarise(apply_tests(capped_frames(long_frames))))
    assert list(table.columns) == [
        "arm", "lr", "exploded", "capped", "bounded", "recovered", "collapsed", "spiked", "ended_above_start",
    ]  # fmt: skip
    assert table["arm"].tolist() == ["AdamW", "Muon", "MuonClip"]
    assert table["capped"].tolist()[0] == "-"
    assert table["capped"].tolist()[2] == "3/3 (1)"


def test_levels_are_summed_up_separately(long_frames):
    outcomes = apply_tests(long_frames).assign(level=lambda table: table["seed"] * 10.0)
    table = outcome_table(summarise(outcomes))
    assert table["level"].tolist() == ["10", "20", "30"] * 3
    assert table["collapsed"].tolist()[3] == "1/1 (1)"


def test_the_switch_is_judged_where_the_clip_goes_off_and_on(runs, make_run):
    folders = [
        folder
        for seed in (1, 2)
        for folder in runs(**{f"s{seed}": make_run("muonclip", seed, num_steps=600, off=(300, 450))})
    ]
    outcomes = apply_tests(collect(folders), windows=[(0, 300), (450, 600)])
    switched = outcomes[outcomes["name"].isin(["climbs", "falls"])]
    assert switched["name"].tolist() == ["climbs", "falls"] * 2
    assert switched["holds"].tolist() == [True] * 4
    for windows in ([(0, 600)], None):
        assert not set(apply_tests(collect(folders), windows)["name"]) & {"climbs", "falls"}
