"""Claims on values made by hand: each answer, the correction over several, the side taken, what cannot be said."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.answers import answer_all
from analysis.claims import read_claim
from analysis.comparison import holm
from analysis.frames import Frames, at_levels
from muonlab.errors import MuonlabError

CLAIM = {"claim": "c", "source": "s", "condition": "x", "arm": "a"}
NONE = pd.DataFrame()


def made_up(values, condition="x", level=math.nan, **columns):
    """One run an arm and seed: `values` = {arm: losses of seeds 1, 2, ...}."""
    rows = [
        {"arm": arm, "seed": seed, "loss": loss, "run": f"{condition}-{arm}-{level}-{seed}"}
        for arm, losses in values.items()
        for seed, loss in enumerate(losses, 1)
    ]
    shared = {"condition": condition, "level": level, "lr": 0.01, "status": "finished", "optimizer": "muon"}
    shared |= {"tau": math.nan, "clipped_share": 0.0, "initial_loss": 5.0, "warmup_steps": 0} | columns
    runs = pd.DataFrame(rows).assign(**shared)
    runs["max_logit"] = runs["loss"]
    steps = runs[["run", "condition", "arm", "seed", "loss"]].rename(columns={"loss": "probe_loss"})
    return Frames(runs, steps.assign(step=0, tokens=10.0), NONE, NONE)


def joined(*frames):
    return Frames(
        *(
            pd.concat(tables, ignore_index=True)
            for tables in zip(*(vars(f).values() for f in frames), strict=True)
        )
    )


def asked(frames, claims):
    """The claims as objects; any arm of the frames may be named."""
    conditions = frames.runs.groupby("condition")["arm"].agg(set).to_dict()
    return [read_claim(claim, conditions) for claim in claims]


def answers(claims, frames, outcomes=NONE):
    return [vars(row) for row in answer_all(asked(frames, claims), frames, outcomes)]


def answer(frames, **claim):
    [row] = answers([CLAIM | claim], frames)
    return row


LOWER = made_up({"a": [2.00, 2.01, 2.02, 2.03], "b": [2.50, 2.52, 2.51, 2.53]})


class TestDifference:
    def test_estimate_interval_floor_and_p_are_those_of_the_paired_values(self):
        row = answer(LOWER, metric="loss", baseline="b", expect="lower")
        difference = np.array([2.00 - 2.50, 2.01 - 2.52, 2.02 - 2.51, 2.03 - 2.53])
        half = stats.t.ppf(0.975, 3) * difference.std(ddof=1) / 2
        assert row["estimate"] == pytest.approx(difference.mean())
        assert (row["low"], row["high"]) == pytest.approx(
            (difference.mean() - half, difference.mean() + half)
        )
        assert row["p"] == row["p_holm"] == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)
        variances = [np.var([2.00, 2.01, 2.02, 2.03], ddof=1), np.var([2.50, 2.52, 2.51, 2.53], ddof=1)]
        assert row["floor"] == pytest.approx(math.sqrt(np.mean(variances)))
        assert (row["n"], row["unit"], row["answer"]) == (4, "nats", "reproduced")
        assert row["effect"].startswith("loss -0.500 [-0.513, -0.487] nats, p = ")

    @pytest.mark.parametrize(
        ("claim", "expected"),
        [
            ({"expect": "higher"}, "opposite"),
            ({"expect": "tie"}, "opposite"),
            ({"expect": "lower", "at_least": 0.4}, "reproduced"),
            ({"expect": "lower", "at_least": 0.6}, "not reproduced"),
            ({"expect": "lower", "as": "ratio"}, "reproduced"),
            ({"expect": "lower", "as": "ratio", "at_least": 1.2}, "reproduced"),
            ({"expect": "lower", "as": "ratio", "at_least": 1.3}, "not reproduced"),
            ({"below": -0.4}, "reproduced"),
            ({"below": -0.6}, "opposite"),
            ({"below": -0.5}, "not reproduced"),
            ({"above": -0.6, "below": -0.4}, "reproduced"),
        ],
    )
    def test_each_answer(self, claim, expected):
        assert answer(LOWER, metric="loss", baseline="b", **claim)["answer"] == expected

    def test_inside_the_floor_is_a_tie_however_sure(self):
        close = made_up({"a": [2.000, 2.100, 2.200], "b": [2.010, 2.111, 2.211]})
        row = answer(close, metric="loss", baseline="b", expect="lower")
        assert row["p"] < 0.01
        assert row["answer"] == "tie"
        assert answer(close, metric="loss", baseline="b", expect="tie")["answer"] == "reproduced"

    def test_large_but_unsure_is_a_tie_and_does_not_show_a_tie(self):
        wide = made_up({"a": [2.0, 2.0, 2.0], "b": [2.1, 3.0, 2.2]})
        row = answer(wide, metric="loss", baseline="b", expect="lower")
        assert abs(row["estimate"]) > row["floor"]
        assert row["answer"] == "tie"
        assert answer(wide, metric="loss", baseline="b", expect="tie")["answer"] == "not reproduced"

    def test_a_ratio_is_a_geometric_mean_judged_on_logarithms(self):
        row = answer(made_up({"a": [1.0, 2.0, 4.0], "b": [1.5, 3.1, 5.9]}), metric="loss", baseline="b",
                     expect="lower", **{"as": "ratio"})  # fmt: skip
        logs = np.log([1 / 1.5, 2 / 3.1, 4 / 5.9])
        assert row["estimate"] == pytest.approx(np.exp(logs.mean()))
        assert row["unit"] == "x"
        assert row["answer"] == "tie", "inside the spread of the seeds, a factor of two"
        negative = answer(made_up({"a": [1, 1], "b": [-1, 1]}), metric="loss", baseline="b", expect="lower",
                          **{"as": "ratio"})  # fmt: skip
        assert negative["answer"] == "not testable"
        assert "has no ratio" in negative["effect"]

    def test_only_shared_seeds_are_paired_and_two_are_needed(self):
        frames = made_up({"a": [2.0, 2.1, 2.2], "b": [3.0]})
        row = answer(frames, metric="loss", baseline="b", expect="lower")
        assert (row["answer"], row["effect"]) == (
            "not testable",
            "one pair of seeds has no interval: two are needed",
        )

    def test_an_infinite_value_counts_as_the_largest_finite_one(self):
        frames = made_up({"a": [2.0, 2.1, 2.2], "b": [9.0, math.inf, 9.2]})
        row = answer(frames, metric="loss", baseline="b", expect="lower")
        assert row["estimate"] == pytest.approx(np.mean([2.0 - 9.0, 2.1 - 9.2, 2.2 - 9.2]))
        assert row["answer"] == "reproduced"

    def test_a_target_never_reached_counts_with_what_was_spent_and_is_reported(self):
        frames = made_up({"a": [1.0, 1.0, 1.0], "b": [9.0, 9.0, 9.0]})
        row = answer(
            frames, measure={"name": "tokens_to_target", "target": 2.0}, baseline="b", expect="lower"
        )
        assert row["effect"].startswith("tokens_to_target (target 2.0) +0 [+0, +0] tokens, 3 never reached")
        assert row["answer"] == "tie"

    def test_a_baseline_may_stand_elsewhere(self):
        frames = joined(
            LOWER, made_up({"a": [1.0, 1.1, 1.2, 1.3]}, "y"), made_up({"a": [1.5, 1.6, 1.7, 1.8]}, "z", 3.0)
        )
        row = answer(frames, metric="loss", baseline={"condition": "y"}, expect="higher")
        assert (row["answer"], row["estimate"]) == ("reproduced", pytest.approx(0.865))
        row = answer(frames, metric="loss", baseline={"condition": "z", "level": 3}, expect="higher")
        assert row["estimate"] == pytest.approx(0.365)


class TestSeveralClaims:
    def test_holm_over_the_comparisons_alone(self):
        frames = made_up({"a": [2.0, 2.1, 2.0, 2.1, 2.0], "b": [2.2, 2.2, 2.15, 2.3, 2.25],
                          "c": [2.3, 2.3, 2.25, 2.4, 2.35]})  # fmt: skip
        difference = CLAIM | {"metric": "loss", "expect": "lower"}
        claims = [
            difference | {"baseline": "b"},
            CLAIM | {"metric": "loss", "below": 3},
            difference | {"baseline": "c"},
        ]
        rows = answers(claims, frames)
        assert [rows[0]["p_holm"], rows[2]["p_holm"]] == pytest.approx(holm([rows[0]["p"], rows[2]["p"]]))
        assert math.isnan(rows[1]["p_holm"])
        alone = answers(claims[:1], frames)[0]
        assert alone["p_holm"] == rows[0]["p"]

    def test_a_difference_that_is_sure_alone_may_be_a_tie_among_many(self):
        frames = made_up({"a": [2.0, 2.0, 2.0, 2.0], "b": [2.2, 2.4, 2.3, 2.5]})
        claim = CLAIM | {"metric": "loss", "baseline": "b", "expect": "lower"}
        assert answers([claim], frames)[0]["answer"] == "reproduced"
        assert {row["answer"] for row in answers([claim] * 5, frames)} == {"tie"}

    def test_a_claim_that_cannot_be_measured_costs_no_other(self):
        claims = [
            CLAIM | {"measure": {"name": "peak", "column": "none"}, "above": 1},
            CLAIM | {"metric": "loss", "above": 1},
        ]
        rows = answers(claims, LOWER)
        assert [row["answer"] for row in rows] == ["not testable", "reproduced"]
        assert "unknown recorded column 'none'" in rows[0]["effect"]


class TestLevels:
    @pytest.mark.parametrize(
        ("claim", "expected"),
        [
            ({"above": 1.9}, "reproduced"),
            ({"above": 2.1}, "opposite"),
            ({"above": 2.015}, "not reproduced"),
            ({"above": 1.9, "below": 2.2}, "reproduced"),
            ({"above": 2.2, "below": 2.4}, "opposite"),
        ],
    )
    def test_the_whole_interval_must_lie_there(self, claim, expected):
        assert answer(LOWER, metric="loss", **claim)["answer"] == expected

    def test_infinite_values_are_judged_one_by_one(self):
        frames = made_up({"a": [math.inf, 3.0, math.inf]})
        assert answer(frames, metric="loss", above=2)["answer"] == "reproduced"
        assert answer(frames, metric="loss", above=4)["answer"] == "not reproduced"
        assert answer(frames, metric="loss", below=2)["answer"] == "opposite"

    def test_a_baseline_that_varies_nothing_has_no_level_to_choose(self):
        frames = joined(made_up({"a": [2.0, 2.1, 2.2]}, level=5.0), made_up({"b": [3.0, 3.11, 3.19]}))
        row = answer(frames, metric="loss", level=5, baseline="b", expect="lower")
        assert row["estimate"] == pytest.approx(-1.0)
        assert row["answer"] == "reproduced"

    def test_one_seed_cannot_be_judged_against_a_level(self):
        assert answer(made_up({"a": [2.0]}), metric="loss", above=1)["answer"] == "not testable"

    def test_levels_choose_runs_by_value_or_name(self):
        frames = joined(made_up({"a": [2.0, 2.1]}, level=0.01), made_up({"a": [3.0, 3.1]}, level=0.03))
        assert answer(frames, metric="loss", level=0.03, above=2.2)["answer"] == "reproduced"
        assert answer(frames, metric="loss", levels=[0.01], below=2.5, above=-9)["estimate"] == pytest.approx(
            2.05
        )
        assert "choose one of the levels 0.01, 0.03" in answer(frames, metric="loss", above=1)["effect"]
        assert "has the level 7" in answer(frames, metric="loss", level=7, above=1)["effect"]
        assert answer(frames, measure="lr_sensitivity", above=0.1)["estimate"] == pytest.approx(0.5)
        mixed = pd.Series(["on", "off", "0.03", None])
        assert at_levels(mixed, ["on", 0.03]).tolist() == [True, False, True, False]


class TestClip:
    clip = staticmethod(lambda share: joined(
        made_up({"a": [2.0, 2.0, 2.0]}, optimizer="muonclip", tau=30.0, clipped_share=share),
        made_up({"b": [2.0, 2.0, 2.0]}),
        made_up({"adam": [2.5, 2.5, 2.6]}, optimizer="adamw"),
    ))  # fmt: skip

    def test_a_clip_that_never_acted_is_no_evidence_against_the_same_optimizer(self):
        row = answer(self.clip(0.0), metric="loss", baseline="b", expect="lower")
        assert (row["answer"], row["effect"]) == (
            "not testable",
            "the clip never acted, which is no evidence",
        )
        assert answer(self.clip(0.1), metric="loss", baseline="b", expect="lower")["answer"] == "tie"
        assert (
            answer(self.clip(0.0), metric="loss", baseline="adam", expect="lower")["answer"] == "reproduced"
        )

    def test_harmless(self):
        row = answer(self.clip(0.1), harmless="b")
        assert (row["answer"], row["n"]) == ("reproduced", 3)
        assert answer(self.clip(0.0), harmless="b")["answer"] == "not testable"


def test_the_side_that_the_evidence_is_on():
    dispute = {"contradicts": "D1", "sides": {"reproduced": "K2", "opposite": "Anson"}}
    asked = {"metric": "loss", "baseline": "b"} | dispute
    assert answer(LOWER, expect="lower", **asked)["side"] == "K2"
    assert answer(LOWER, expect="higher", **asked)["side"] == "Anson"
    assert answer(LOWER, expect="lower", at_least=3, **asked)["side"] == "neither"
    assert answer(made_up({"a": [1.0], "b": [1.0]}), expect="lower", **asked)["side"] == "cannot tell"
    assert answer(LOWER, metric="loss", above=1)["side"] == ""


@pytest.mark.parametrize(
    ("holds", "expect", "expected", "share"),
    [
        ([True, True, True], True, "reproduced", "spiked in 3 of 3, share [0.29, 1.00]; value 2 (1 to 3)"),
        ([False, None, False], True, "opposite", "spiked in 0 of 2, share [0.00, 0.84]; value 2 (1 to 3)"),
        ([False, None, False], False, "reproduced", "spiked in 0 of 2, share [0.00, 0.84]; value 2 (1 to 3)"),
        (
            [True, False, True],
            False,
            "not reproduced",
            "spiked in 2 of 3, share [0.09, 0.99]; value 2 (1 to 3)",
        ),
    ],
)
def test_a_test_of_each_run_comes_with_the_interval_of_its_share(holds, expect, expected, share):
    rows = pd.DataFrame({"holds": pd.Series(holds, dtype=object), "value": [1.0, 2.0, 3.0]})
    rows = rows.assign(condition="x", arm="a", name="spiked", level=math.nan)
    claim = CLAIM | {"test": "spiked", "expect": expect}
    [row] = answers([claim], LOWER, rows)
    assert (row["answer"], row["effect"], row["unit"]) == (expected, share, "share of runs")
    assert row["low"] <= row["estimate"] <= row["high"]


CONDITIONS = {"x": ["a", "b"], "search": ["a"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": "loss"}, "did you mean 'metric'"),
        ({"source": ""}, "needs `claim` and `source`"),
        ({"condition": "z"}, "unknown condition of 'c' 'z'"),
        ({"arm": "q"}, "unknown arm of 'c' 'q'"),
        ({"baseline": "q"}, "unknown baseline of 'c' 'q'"),
        ({"baseline": {"condition": "y"}}, "unknown condition of 'c' 'y'"),
        ({"baseline": {"arm": "q"}}, "unknown baseline of 'c' 'q'"),
        ({"expect": "loewr"}, "did you mean 'lower'"),
        ({"baseline": None, "expect": "lower"}, "names no `baseline`"),
        ({"expect": None, "baseline": None}, "no test, and no metric or measure"),
        ({"metric": None}, "no test, and no metric or measure"),
        ({"metric": "los"}, "did you mean 'loss'"),
        ({"metric": None, "measure": "lr_sensitivty"}, "did you mean 'lr_sensitivity'"),
        ({"as": "ration"}, "did you mean 'ratio'"),
        ({"sides": {"reprodced": "K2"}}, "did you mean 'reproduced'"),
        ({"test": "capt", "expect": True}, "did you mean 'capped'"),
        ({"test": "capped", "expect": "lower"}, "`expect` is true or false"),
        ({"condition": "search", "baseline": "a"}, "seeds that chose a setting"),
        ({"condition": None}, "needs `arm`, and `condition`"),
        ({"measure": "lr_sensitivity"}, "has a `metric` and a `measure`"),
        ({"metric": None, "measure": "compute_ratio", "baseline": None, "above": 1}, "needs a `baseline`"),
        ({"above": "high"}, "`above` of the claim 'c' must be a number"),
        ({"conditions": "x"}, "`conditions` of the claim 'c' must be a list"),
        ({"baseline": {"expect": "lower"}}, "unknown key of the claim 'c' 'expect'"),
    ],
)  # fmt: skip
def test_claims_that_no_run_could_answer_are_refused(change, message):
    claim = CLAIM | {"metric": "loss", "baseline": "b", "expect": "lower"} | change
    with pytest.raises(MuonlabError, match=message):
        read_claim({key: value for key, value in claim.items() if value is not None}, CONDITIONS, ["search"])


def test_a_search_may_show_its_shape_but_not_its_best():
    claim = CLAIM | {"condition": "search", "above": 0}
    read_claim(claim | {"measure": "lr_sensitivity"}, CONDITIONS, ["search"])
    with pytest.raises(MuonlabError, match="seeds that chose a setting"):
        read_claim(claim | {"measure": "best"}, CONDITIONS, ["search"])
