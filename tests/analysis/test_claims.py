"""Claims as files ask them, and their answers over a whole page."""

import math

import numpy as np
import pandas as pd
import pytest
from claim_answers import CLAIM, LOWER, answer, answers, made_up
from scipy import stats

from analysis.answers import correct_page
from analysis.claims import read_claim
from muonlab.errors import MuonlabError


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
