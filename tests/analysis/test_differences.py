"""Claims on values made by hand: what a difference answers, alone and among others, over levels too."""

import math

import numpy as np
import pandas as pd
import pytest
from claim_answers import CLAIM, LOWER, answer, answers, joined, made_up
from scipy import stats

from analysis.answers import Circumstance
from analysis.frames import at_levels
from analysis.inference import holm, smallest_detectable


class TestDifference:
    def test_estimate_interval_and_p_are_those_of_the_paired_values(self):
        row = answer(LOWER, metric="loss", baseline="b", expect="lower")
        difference = np.array([2.00 - 2.50, 2.01 - 2.52, 2.02 - 2.51, 2.03 - 2.53])
        half = stats.t.ppf(0.975, 3) * difference.std(ddof=1) / 2
        assert row["estimate"] == pytest.approx(difference.mean())
        assert (row["low"], row["high"]) == pytest.approx(
            (difference.mean() - half, difference.mean() + half)
        )
        assert [row["p"], row["p_holm"]] == pytest.approx([stats.ttest_1samp(difference, 0).pvalue] * 2)
        assert (row["n"], row["unit"], row["answer"]) == (4, "nats", "reproduced")
        assert row["effect"].startswith("loss -0.500 [-0.513, -0.487] nats, p = ")

    @pytest.mark.parametrize(
        ("claim", "expected"),
        [
            ({"expect": "lower"}, "reproduced"),
            ({"expect": "higher"}, "contradicted"),
            ({"expect": "equal"}, "contradicted"),
            ({"expect": "equal", "margin": 0.6}, "reproduced"),
            ({"expect": "higher", "margin": 0.6}, "equivalent"),
            ({"expect": "lower", "margin": 0.6}, "equivalent"),
            ({"expect": "lower", "at_least": 0.4}, "reproduced"),
            ({"expect": "lower", "at_least": 0.5}, "unresolved"),
            ({"expect": "lower", "at_least": 0.6}, "contradicted"),
            ({"expect": "lower", "as": "ratio"}, "reproduced"),
            ({"expect": "lower", "as": "ratio", "at_least": 1.2}, "reproduced"),
            ({"expect": "lower", "as": "ratio", "at_least": 1.3}, "contradicted"),
            ({"expect": "equal", "as": "ratio", "margin": 1.3}, "reproduced"),
            ({"below": -0.4}, "reproduced"),
            ({"below": -0.6}, "contradicted"),
            ({"below": -0.5}, "unresolved"),
            ({"above": -0.6, "below": -0.4}, "reproduced"),
        ],
    )
    def test_each_answer(self, claim, expected):
        assert answer(LOWER, metric="loss", baseline="b", **claim)["answer"] == expected

    def test_a_sure_difference_inside_the_margin_is_equivalent(self):
        close = made_up({"a": [2.000, 2.100, 2.200], "b": [2.0010, 2.1011, 2.2011]})
        row = answer(close, metric="loss", baseline="b", expect="lower")
        assert row["p"] < 0.01
        assert row["answer"] == "equivalent"
        assert row["equivalence_p"] < 0.01
        assert answer(close, metric="loss", baseline="b", expect="equal")["answer"] == "reproduced"

    def test_an_interval_across_the_margin_is_unresolved_and_says_what_would_have_been_seen(self):
        wide = made_up({"a": [2.0, 2.0, 2.0], "b": [2.1, 3.0, 2.2]})
        row = answer(wide, metric="loss", baseline="b", expect="lower")
        assert row["answer"] == "unresolved"
        size = smallest_detectable([0.1, 1.0, 0.2])
        assert row["why"] == f"a difference of {size:.3g} nats or more would have been detected (power 0.8)"
        assert answer(wide, metric="loss", baseline="b", expect="equal")["answer"] == "unresolved"

    def test_a_ratio_is_a_geometric_mean_judged_on_logarithms(self):
        row = answer(made_up({"a": [1.0, 2.0, 4.0], "b": [1.5, 3.1, 5.9]}), metric="loss", baseline="b",
                     expect="lower", **{"as": "ratio"})  # fmt: skip
        logs = np.log([1 / 1.5, 2 / 3.1, 4 / 5.9])
        assert row["estimate"] == pytest.approx(np.exp(logs.mean()))
        assert row["unit"] == "x"
        assert row["answer"] == "reproduced"
        assert math.isnan(row["equivalence_p"]), "a ratio of losses has no usual margin"
        negative = answer(made_up({"a": [1, 1], "b": [-1, 1]}), metric="loss", baseline="b", expect="lower",
                          **{"as": "ratio"})  # fmt: skip
        assert negative["answer"] == "not testable"
        assert "has no ratio" in negative["why"]

    def test_two_max_logits_within_a_factor_of_a_quarter_are_equivalent(self):
        frames = made_up({"a": [30.0, 31.0, 29.0, 30.5], "b": [31.0, 30.0, 30.0, 30.0]})
        claim = {"metric": "max_logit", "baseline": "b", "as": "ratio"}
        assert answer(frames, expect="higher", **claim)["answer"] == "equivalent"
        assert answer(frames, expect="higher", margin=1.01, **claim)["answer"] == "unresolved"
        assert answer(frames, expect="higher", margin=1.01, **claim)["why"].startswith("a factor of 1.0")

    def test_only_shared_seeds_are_paired_and_two_are_needed(self):
        frames = made_up({"a": [2.0, 2.1, 2.2], "b": [3.0]})
        row = answer(frames, metric="loss", baseline="b", expect="lower")
        assert (row["answer"], row["why"]) == (
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
        assert row["answer"] == "unresolved"

    def test_a_baseline_may_be_in_another_condition(self):
        frames = joined(
            LOWER, made_up({"a": [1.0, 1.1, 1.2, 1.3]}, "y"), made_up({"a": [1.5, 1.6, 1.7, 1.8]}, "z", 3.0)
        )
        row = answer(frames, metric="loss", baseline={"condition": "y"}, expect="higher")
        assert (row["answer"], row["estimate"]) == ("reproduced", pytest.approx(0.865))
        row = answer(frames, metric="loss", baseline={"condition": "z", "level": 3}, expect="higher")
        assert row["estimate"] == pytest.approx(0.365)


class TestSeveralClaims:
    def test_holm_over_all_that_have_a_p(self):
        frames = made_up({"a": [2.0, 2.1, 2.0, 2.1, 2.0], "b": [2.2, 2.2, 2.15, 2.3, 2.25],
                          "c": [2.3, 2.3, 2.25, 2.4, 2.35]})  # fmt: skip
        difference = CLAIM | {"metric": "loss", "expect": "lower"}
        claims = [
            difference | {"baseline": "b"},
            CLAIM | {"metric": "loss", "below": 3},
            difference | {"baseline": "c"},
            CLAIM | {"measure": {"name": "peak", "column": "none"}, "above": 1},
        ]
        rows = answers(claims, frames)
        assert [row["p_holm"] for row in rows[:3]] == pytest.approx(holm([row["p"] for row in rows[:3]]))
        assert math.isnan(rows[3]["p_holm"])
        alone = answers(claims[:1], frames)[0]
        assert alone["p_holm"] == alone["p"] == rows[0]["p"]

    def test_a_difference_that_is_sure_alone_may_be_unresolved_among_many(self):
        frames = made_up({"a": [2.0, 2.0, 2.0, 2.0], "b": [2.2, 2.4, 2.3, 2.5]})
        claim = CLAIM | {"metric": "loss", "baseline": "b", "expect": "lower"}
        assert answers([claim], frames)[0]["answer"] == "reproduced"
        several = answers([claim] * 5, frames)
        assert {row["answer"] for row in several} == {"unresolved"}
        p = several[0]["p"]
        assert several[0]["why"] == f"p = {p:.2g} alone, {5 * p:.2g} among the claims of its experiment"

    def test_a_look_that_was_planned_has_its_share_of_the_error(self):
        frames = made_up({"a": [2.0, 2.0, 2.0, 2.0], "b": [2.2, 2.4, 2.3, 2.5]})
        claim = CLAIM | {"metric": "loss", "baseline": "b", "expect": "lower"}
        [row] = answers([claim], frames, circumstances=[Circumstance(alpha=0.01)])
        assert (row["p_holm"], row["answer"]) == (pytest.approx(5 * row["p"]), "unresolved")

    def test_an_edge_of_the_search_answers_nothing(self):
        edge = [Circumstance(untestable="the search for b ended at the edge of its range")]
        claim = CLAIM | {"metric": "loss", "baseline": "b", "expect": "lower"}
        [row] = answers([claim], LOWER, circumstances=edge)
        assert (row["answer"], row["why"]) == (
            "not testable",
            "the search for b ended at the edge of its range",
        )
        assert math.isnan(row["p"]), "it takes no part in a correction"
        said = answer(LOWER, metric="loss", baseline="b", expect="lower", not_testable="too short")
        assert (said["answer"], said["why"]) == ("not testable", "too short")

    def test_a_claim_that_cannot_be_measured_costs_no_other(self):
        claims = [
            CLAIM | {"measure": {"name": "peak", "column": "none"}, "above": 1},
            CLAIM | {"metric": "loss", "above": 1},
        ]
        rows = answers(claims, LOWER)
        assert [row["answer"] for row in rows] == ["not testable", "reproduced"]
        assert "unknown recorded column 'none'" in rows[0]["why"]


class TestLevels:
    @pytest.mark.parametrize(
        ("claim", "expected"),
        [
            ({"above": 1.9}, "reproduced"),
            ({"above": 2.1}, "contradicted"),
            ({"above": 2.015}, "unresolved"),
            ({"above": 1.9, "below": 2.2}, "reproduced"),
            ({"above": 2.2, "below": 2.4}, "contradicted"),
        ],
    )
    def test_the_whole_interval_must_lie_there(self, claim, expected):
        assert answer(LOWER, metric="loss", **claim)["answer"] == expected

    def test_infinite_values_are_judged_one_by_one(self):
        """Where there is no interval the share of the seeds decides, of which five are needed."""
        frames = made_up({"a": [math.inf, 3.0, math.inf, 4.0, 5.0]})
        assert answer(frames, metric="loss", above=2)["answer"] == "reproduced"
        assert answer(frames, metric="loss", above=3.5)["answer"] == "unresolved"
        assert answer(frames, metric="loss", below=2)["answer"] == "contradicted"
        assert answer(made_up({"a": [math.inf, 3.0]}), metric="loss", above=2)["answer"] == "unresolved"

    def test_equal_values_are_judged_one_by_one(self):
        claim = {"metric": "loss", "above": 0.5}
        assert answer(made_up({"a": [1.0] * 5}), **claim)["answer"] == "reproduced"
        assert answer(made_up({"a": [0.1] * 5}), **claim)["answer"] == "contradicted"
        assert answer(made_up({"a": [1.0] * 3}), **claim)["answer"] == "unresolved", "three of three"

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
        assert "choose one of the levels 0.01, 0.03" in answer(frames, metric="loss", above=1)["why"]
        assert "has the level 7" in answer(frames, metric="loss", level=7, above=1)["why"]
        assert answer(frames, measure="lr_sensitivity", above=0.1)["estimate"] == pytest.approx(0.5)
        mixed = pd.Series(["on", "off", "0.03", None])
        assert at_levels(mixed, ["on", 0.03]).tolist() == [True, False, True, False]
