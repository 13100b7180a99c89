"""Claims on values made by hand: what has to have been there before absence or a cure says anything."""

import math
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
from claim_answers import CLAIM, LOWER, answer, answers, joined, made_up, outcomes_of
from scipy import stats


class TestWhatActed:
    clip = staticmethod(lambda loss: joined(
        made_up({"a": [2.0, 2.1, 2.2]}, optimizer="muonclip", tau=30.0),
        made_up({"b": [loss, 2.1, 2.2]}),
        made_up({"adam": [2.5, 2.5, 2.6]}, optimizer="adamw"),
    ))  # fmt: skip

    @pytest.mark.parametrize(
        "claim", [{"metric": "loss", "baseline": "b", "expect": "lower"}, {"harmless": "b"}]
    )
    def test_arms_whose_runs_are_the_same_say_nothing(self, claim):
        """A clip that never acted, whatever the arms are called."""
        row = answer(self.clip(2.0), **claim)
        assert row["answer"] == "not testable"
        assert "same to the bit: what tells them apart never acted" in row["why"]
        assert answer(self.clip(2.001), **claim)["answer"] != "not testable"
        assert (
            answer(self.clip(2.0), metric="loss", baseline="adam", expect="lower")["answer"] == "reproduced"
        )

    def test_harmless_is_a_loss_inside_the_margin(self):
        frames = made_up({"a": [2.0, 2.1, 2.2], "b": [2.0005, 2.0999, 2.2001]})
        assert answer(frames, harmless="b")["answer"] == "reproduced"
        assert answer(LOWER, harmless="b")["answer"] == "contradicted"


class TestControl:
    """A remedy is judged on the seeds whose control showed what it is a remedy for."""

    frames = made_up({"cure": [2.0, 2.1, 2.0, 2.1, 2.9, 2.8], "ill": [2.5, 2.6, 2.4, 2.6, 2.1, 2.2]})
    claim = MappingProxyType({"arm": "cure", "baseline": "ill", "metric": "loss", "expect": "lower"})

    def test_a_control_that_was_healthy_too_makes_the_claim_vacuous(self):
        healthy = outcomes_of(ill=[1, 2, 1, 3, 2, 1], cure=[1] * 6)
        row = answer(self.frames, healthy, control={"arm": "ill", "test": "exploded"}, **self.claim)
        assert (row["answer"], row["why"]) == (
            "not testable",
            "its control (ill exploded) showed it in 0 of 6 runs",
        )
        no_spike = answer(
            self.frames, healthy, arm="cure", test="exploded", expect=False,
            control={"arm": "ill", "test": "exploded"},
        )  # fmt: skip
        assert no_spike["answer"] == "not testable"

    def test_only_the_seeds_that_it_showed_are_judged(self):
        outcomes = outcomes_of(ill=[20, 30, 20, 30, 2, None])
        with_control = answer(self.frames, outcomes, control={"arm": "ill", "test": "exploded"}, **self.claim)
        assert (with_control["n"], with_control["answer"]) == (4, "reproduced")
        assert answer(self.frames, outcomes, **self.claim)["answer"] == "unresolved"
        by_value = answer(
            self.frames, outcomes, control={"arm": "ill", "metric": "loss", "above": 2.3}, **self.claim
        )
        assert (by_value["n"], by_value["answer"]) == (4, "reproduced")
        measured = {"arm": "ill", "measure": {"name": "peak", "column": "probe_loss"}}
        assert answer(self.frames, outcomes, control=measured | {"below": 100}, **self.claim)["n"] == 6
        assert answer(self.frames, outcomes, control=measured | {"above": 100}, **self.claim)["n"] == 0

    def test_absence_where_the_control_showed_it_is_a_finding_from_five_seeds_on(self):
        claim = {
            "arm": "cure",
            "test": "exploded",
            "expect": False,
            "control": {"arm": "ill", "test": "exploded"},
        }
        assert answer(self.frames, outcomes_of(ill=[20] * 5, cure=[2] * 5), **claim)["answer"] == "reproduced"
        assert answer(self.frames, outcomes_of(ill=[20] * 4, cure=[2] * 4), **claim)["answer"] == "unresolved"
        assert (
            answer(self.frames, outcomes_of(ill=[20] * 5, cure=[30] * 5), **claim)["answer"] == "contradicted"
        )


class TestAbsence:
    claim = MappingProxyType(CLAIM | {"test": "spiked", "expect": True, "share": 0.1})

    def answered(self, values, precondition=None, **more):
        outcomes = pd.concat(
            [
                outcomes_of("spiked", threshold=0.0, a=values),
                outcomes_of(a=more.pop("exploded", [20] * len(values))),
            ]
        )
        needs = {"precondition": {"test": "exploded"}} if precondition else {}
        return answers([self.claim | needs | more], made_up({"a": [2.0] * len(values)}), outcomes)[0]

    def test_none_of_five_is_not_seen_and_says_how_large_the_share_may_be(self):
        row = self.answered([0.0] * 5, precondition=True)
        assert (row["answer"], row["why"]) == (
            "not seen here",
            "in none of 5 runs; the share may be as large as 0.45",
        )

    def test_it_contradicts_where_the_cause_was_there_and_the_runs_were_many(self):
        assert self.answered([0.0] * 40, precondition=True)["answer"] == "contradicted"
        assert self.answered([0.0] * 40)["answer"] == "not seen here", (
            "nobody knows whether the cause was there"
        )
        without = self.answered([0.0] * 40, precondition=True, exploded=[20] * 39 + [2])
        assert without["answer"] == "not seen here"
        assert without["why"].startswith(
            "what it needs (a exploded) was there in 39 of 40 runs; in none of 40"
        )

    @pytest.mark.parametrize(
        ("spikes", "runs", "expected"),
        [(8, 20, "reproduced"), (6, 20, "reproduced"), (3, 20, "unresolved"), (1, 60, "contradicted")],
    )
    def test_a_claim_about_some_runs_is_judged_by_their_share(self, spikes, runs, expected):
        """Spikes in a tenth of the runs or more; how high they are says nothing of the other runs."""
        row = self.answered(
            [0.1 + 0.01 * i for i in range(spikes)] + [0.0] * (runs - spikes), precondition=True
        )
        assert row["answer"] == expected
        more = stats.binomtest(spikes, runs, 0.1, alternative="greater").pvalue
        fewer = stats.binomtest(spikes, runs, 0.1, alternative="less").pvalue
        assert row["p"] == pytest.approx(min(1, 2 * min(more, fewer)))

    def test_a_test_that_fails_against_its_precondition_in_every_run_contradicts(self):
        outcomes = outcomes_of("capped", threshold=0.95, a=[0.7, 0.75, 0.8, 0.72, 0.7])
        frames = made_up({"a": [40.0] * 5})
        claim = {"test": "capped", "expect": True, "precondition": {"metric": "max_logit", "above": 30}}
        assert answer(frames, outcomes, **claim)["answer"] == "contradicted"
        assert answer(made_up({"a": [20.0] * 5}), outcomes, **claim)["answer"] == "not seen here"

    def test_a_difference_the_other_way_without_its_precondition_contradicts_nothing(self):
        needs = {"precondition": {"arm": "a", "test": "exploded"}}
        asked_for = {"metric": "loss", "baseline": "b", "expect": "higher"} | needs
        assert answer(LOWER, outcomes_of(a=[20] * 4), **asked_for)["answer"] == "contradicted"
        row = answer(LOWER, outcomes_of(a=[20, 20, 2, 20]), **asked_for)
        assert (row["answer"], row["why"]) == (
            "not seen here",
            "what it needs (a exploded) was there in 3 of 4 runs",
        )

    @pytest.mark.parametrize(
        ("values", "expected", "effect"),
        [
            (
                [20, 30, 25, 24, 28],
                "reproduced",
                "5 of 5, share [0.48, 1.00]; median 25 (20 to 30)",
            ),
            (
                [20, 30, 25],
                "unresolved",
                "3 of 3, share [0.29, 1.00]; median 25 (20 to 30)",
            ),
            (
                [20, 30, 2, 24, 28],
                "unresolved",
                "4 of 5, share [0.28, 0.99]; median 24 (2 to 30)",
            ),
            (
                [20, 30, 25, 24, 28, 27, 9, 22],
                "reproduced",
                "7 of 8, share [0.47, 1.00]; median 24.5 (9 to 30)",
            ),
            (
                [20, 20, 20, 20, 20],
                "reproduced",
                "5 of 5, share [0.48, 1.00]; median 20 (20 to 20)",
            ),
            (
                [11, 90, 500, 12, 13],
                "unresolved",
                "5 of 5, share [0.48, 1.00]; median 13 (11 to 500)",
            ),
        ],
    )
    def test_most_runs_and_clear_of_the_threshold(self, values, expected, effect):
        """By the bound of the share, and by a t test of the value where it has a spread."""
        row = answer(LOWER, outcomes_of(a=values), test="exploded", expect=True)
        p = stats.ttest_1samp(values, 10).pvalue if np.ptp(values) else math.nan
        assert row["effect"] == f"exploded in {effect} times its value after warm-up" + (
            "" if math.isnan(p) else f", p = {p:.2g}"
        )
        assert (row["answer"], row["unit"]) == (expected, "share of runs")
        assert row["low"] <= row["estimate"] <= row["high"]
