"""Claims on values made by hand: each answer, its control and precondition, the corrections, and what cannot be
said."""

import math
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.answers import Circumstance, answer_all, correct_page
from analysis.claims import read_claim
from analysis.frames import Frames, at_levels
from analysis.inference import holm, smallest_detectable
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
            for tables in zip(*(f.tables.values() for f in frames), strict=True)
        )
    )


def asked(frames, claims):
    """The claims as objects; any arm of the frames may be named."""
    conditions = frames.runs.groupby("condition")["arm"].agg(set).to_dict()
    return [read_claim(claim, conditions) for claim in claims]


def answers(claims, frames, outcomes=NONE, circumstances=None):
    return [vars(row) for row in answer_all(asked(frames, claims), frames, outcomes, circumstances)]


def answer(frames, outcomes=NONE, **claim):
    [row] = answers([CLAIM | claim], frames, outcomes)
    return row


def outcomes_of(name="exploded", condition="x", threshold=10.0, **holds):
    """Outcomes of one test: arm -> one value a seed 1, 2, ..., above the threshold where it holds; None: not judged."""
    rows = [
        {"arm": arm, "seed": seed, "value": value, "holds": None if value is None else value > threshold}
        for arm, values in holds.items()
        for seed, value in enumerate(values, 1)
    ]
    return pd.DataFrame(rows).assign(condition=condition, name=name, level=math.nan, threshold=threshold)


LOWER = made_up({"a": [2.00, 2.01, 2.02, 2.03], "b": [2.50, 2.52, 2.51, 2.53]})


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


class TestPage:
    def family(self, rng, size=100, effect=0.0, seeds=5):
        """A page of one claim an experiment, whose differences have the mean `effect`."""
        rows = []
        for _ in range(size):
            a = rng.normal(2.0 + effect, 0.02, seeds)
            frames = made_up({"a": a.tolist(), "b": [2.0] * seeds})
            rows += answers([CLAIM | {"metric": "loss", "baseline": "b", "expect": "lower"}], frames)
        return pd.DataFrame(rows).assign(experiment=[f"e{number}" for number in range(size)])

    def test_what_two_experiments_answer_from_the_same_runs_counts_once(self):
        one, other = (
            self.family(np.random.default_rng(3), 4, effect=-0.2),
            self.family(np.random.default_rng(4), 4),
        )
        repeated = one.iloc[[1]].assign(experiment="again", claim="the same in other words", p_holm=0.9)
        page = correct_page(pd.concat([one, repeated, other]))
        assert page["repeats"].tolist() == [""] * 4 + ["e1"] + [""] * 4
        assert page["q"].drop(4).tolist() == correct_page(pd.concat([one, other]))["q"].tolist()
        assert page.loc[4, "q"] == page.loc[1, "q"]
        assert page.loc[4, "why"] == "the same runs as in e1, counted there"

    def test_equal_shares_of_different_runs_are_two_findings(self):
        share = self.family(np.random.default_rng(3), 1).assign(
            unit="share of runs", estimate=0.0, low=0.0, high=0.5
        )
        page = correct_page(pd.concat([share, share.assign(experiment="other")]))
        assert page["repeats"].tolist() == ["", ""]

    def test_of_200_families_of_100_true_nulls_one_in_twenty_has_a_finding(self):
        """The p of 20,000 true nulls are uniform, which the first family shows; the others are drawn as such."""
        rng = np.random.default_rng(1)
        real = self.family(rng)
        assert stats.kstest(real["p"], "uniform").pvalue > 0.01
        assert (real["answer"].isin(["reproduced", "contradicted"])).any(), "one by one, some are"
        wrong = 0
        for _ in range(200):
            p = rng.uniform(size=100)
            page = real.assign(p=p, equivalence_p=1.0, answer=np.where(p < 0.05, "reproduced", "unresolved"))
            wrong += (correct_page(page)["answer"] == "reproduced").any()
        assert wrong <= 0.05 * 200 + 2 * math.sqrt(200 * 0.05 * 0.95)

    def test_real_findings_survive_and_lone_ones_do_not(self):
        rng = np.random.default_rng(2)
        page = correct_page(self.family(rng, 20, effect=-0.2))
        assert (page["answer"] == "reproduced").all()
        assert (page["q"] >= page["p"]).all()
        weak = self.family(rng, 40)
        weak.loc[0, ["p", "answer", "side", "headline"]] = [0.03, "reproduced", "K2", "It is so"]
        row = correct_page(weak.assign(equivalence_p=1.0)).iloc[0]
        assert (row["answer"], row["side"], row["headline"]) == ("unresolved", "neither", "")
        assert row["why"].startswith("one finding among many: q = ")


def test_the_side_that_the_evidence_is_on():
    dispute = {"contradicts": "D1", "sides": {"reproduced": "K2", "contradicted": "Anson"}}
    asked = {"metric": "loss", "baseline": "b"} | dispute
    assert answer(LOWER, expect="lower", **asked)["side"] == "K2"
    assert answer(LOWER, expect="higher", **asked)["side"] == "Anson"
    assert answer(LOWER, expect="lower", at_least=0.5, **asked)["side"] == "neither"
    assert answer(made_up({"a": [1.0], "b": [1.0]}), expect="lower", **asked)["side"] == "cannot tell"
    assert answer(LOWER, metric="loss", above=1)["side"] == ""


def test_claims_of_our_own_are_marked_and_sentences_follow_the_answer():
    lines = {"reproduced": "It is so", "unresolved": "Whether it is so"}
    row = answer(LOWER, metric="loss", above=1, headlines=lines, source="muonlab, its earlier runs")
    assert (row["own"], row["headline"]) == (True, "It is so")
    assert answer(LOWER, metric="loss", above=9, headlines=lines)["headline"] == ""
    assert answer(LOWER, metric="loss", above=9)["own"] is False


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
        ({"sides": {"unresolved": "K2"}}, "unknown answer that names a side"),
        ({"headlines": {"sure": "It is so"}}, "unknown answer in `headlines`"),
        ({"test": "capped", "expect": False}, "something is absent; it needs a `control`"),
        ({"control": {"arm": "b", "test": "explode"}}, "did you mean 'exploded'"),
        ({"control": {"arm": "q", "test": "exploded"}}, "unknown control of 'c' 'q'"),
        ({"control": {"arm": "b"}}, "names a `test`, or a `metric` or `measure`"),
        ({"precondition": {"metric": "los", "above": 1}}, "did you mean 'loss'"),
        ({"precondition": {"metric": "loss"}}, "needs `above` or `below`"),
        ({"margin": 0}, "`margin` of the claim 'c' must be"),
        ({"expect": "equal", "metric": "num_steps"}, "needs a `margin`"),
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
