"""Intervals, tests of a region and their corrections: against scipy, by hand, and by how often they err."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.inference import (
    Interval,
    Region,
    alpha_spent,
    benjamini_hochberg,
    holm,
    one_sided,
    paired_p,
    share_bound,
    share_interval,
    smallest_detectable,
    t_interval,
)
from muonlab.errors import MuonlabError

SAMPLES = st.lists(st.floats(-5, 5), min_size=2, max_size=8).filter(lambda x: np.ptp(x) > 1e-3)


@given(st.integers(1, 40))
def test_a_share_of_none_or_all_has_the_interval_of_the_formula(n):
    """Clopper-Pearson at the ends: (1 - p)^n = 2.5 %."""
    open_end = 1 - 0.025 ** (1 / n)
    none, every = share_interval(0, n), share_interval(n, n)
    assert (none.estimate, none.low, none.high) == pytest.approx((0, 0, open_end), rel=1e-9)
    assert (every.estimate, every.low, every.high) == pytest.approx((1, 1 - open_end, 1), rel=1e-9)


def test_an_interval_of_a_share_covers_at_least_as_said():
    for p in (0.05, 0.3, 0.5, 0.9):
        chances = stats.binom.pmf(np.arange(8), 7, p)
        inside = [share_interval(k, 7).low <= p <= share_interval(k, 7).high for k in range(8)]
        assert chances[inside].sum() >= 0.95
    with pytest.raises(MuonlabError, match="no runs"):
        share_interval(0, 0)


def test_t_interval_equals_scipys():
    x = [1.2, 1.5, 0.9, 1.1]
    ours = t_interval(x)
    theirs = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert ours.estimate == pytest.approx(1.175)
    assert ours.n == 4


def test_t_interval_by_hand():
    # t_{0.975, 2} = 4.302653; s = 1; s / sqrt(3) = 0.577350
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.high == pytest.approx(2 + 4.302653 * 0.577350, abs=1e-5)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_t_interval_covers_as_often_as_it_says(n):
    draws = np.random.default_rng(0).normal(2.0, 0.3, (2000, n))
    intervals = [t_interval(row) for row in draws]
    covered = np.mean([i.low <= 2.0 <= i.high for i in intervals])
    # 2,000 draws of 0.95 have a standard error of 0.005.
    assert 0.935 < covered < 0.965


def test_one_value_has_no_interval():
    interval = t_interval([1.5])
    assert interval.estimate == 1.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert str(interval) == "1.500 (n=1)"
    assert str(Interval(1.0, 0.9, 1.1, 3)) == "1.000 [0.900, 1.100]"


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_values_that_are_not_finite_are_refused(values):
    with pytest.raises(MuonlabError, match="finite"):
        t_interval(values)


@given(st.integers(1, 40), st.data())
def test_the_upper_bound_of_a_share_errs_in_at_most_one_of_twenty(n, data):
    """P(at most k | bound) = 5 % (Clopper-Pearson)."""
    k = data.draw(st.integers(0, n))
    bound = share_bound(k, n)
    assert bound == 1.0 if k == n else stats.binom.cdf(k, n, bound) == pytest.approx(0.05, rel=1e-6)
    assert share_bound(0, 20) == pytest.approx(0.139, abs=1e-3)


@given(SAMPLES, st.floats(-6, 6))
def test_a_region_with_one_limit_is_scipys_one_sided_test(x, limit):
    above, below = one_sided(x, Region(low=limit)), one_sided(x, Region(high=limit))
    assert above.inside == pytest.approx(stats.ttest_1samp(x, limit, alternative="greater").pvalue)
    assert below.inside == pytest.approx(stats.ttest_1samp(x, limit, alternative="less").pvalue)
    assert (above.outside, below.outside) == pytest.approx((below.inside, above.inside))


@given(SAMPLES, st.floats(0.001, 3))
def test_equivalence_is_where_the_90_percent_interval_lies_within_the_margin(x, margin):
    """The two one-sided tests, by their other definition (Schuirmann 1987)."""
    ends = stats.ttest_1samp(x, 0).confidence_interval(0.90)
    p = one_sided(x, Region(-margin, margin)).inside
    assert (p < 0.05) == (-margin < ends.low and ends.high < margin) or abs(p - 0.05) < 1e-9


def test_two_arms_at_the_margin_are_taken_for_equal_in_one_of_twenty():
    rng = np.random.default_rng(5)
    p = [one_sided(rng.normal(0.003, 0.001, 6), Region(-0.003, 0.003)).inside for _ in range(2000)]
    assert np.mean(np.array(p) < 0.05) < 0.05 + 3 * 0.005


def test_values_without_spread_lie_on_one_side_for_sure():
    assert one_sided([0.5, 0.5], Region(low=0.1)) == one_sided([-0.5, -0.5], Region(high=-0.1))
    assert (
        one_sided([0.5, 0.5], Region(low=0.1)).inside,
        one_sided([0.5, 0.5], Region(high=0.1)).inside,
    ) == (0, 1)
    assert [paired_p(np.array(x)) for x in ([0.0, 0.0], [0.3, 0.3])] == [1.0, 0.0]
    assert math.isnan(one_sided([1.0], Region(low=0.0)).inside)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_detectable_difference_is_found_four_times_of_five(n):
    rng = np.random.default_rng(n)
    x = rng.normal(0, 1, n)
    delta = smallest_detectable((x - x.mean()) / x.std(ddof=1))  # of a spread of exactly one
    found = [stats.ttest_1samp(rng.normal(delta, 1, n), 0).pvalue < 0.05 for _ in range(3000)]
    assert np.mean(found) == pytest.approx(0.8, abs=3 * 0.0073)
    assert math.isnan(smallest_detectable([1.0]))


def test_the_looks_together_spend_five_percent():
    for looks in ([5], [5, 10], [3, 6, 12, 24]):
        assert sum(alpha_spent(look, looks) for look in looks) == pytest.approx(0.05)
    assert alpha_spent(5, [5, 10]) == pytest.approx(0.05 * math.log(1 + (math.e - 1) / 2))
    with pytest.raises(MuonlabError, match="a look at 7 seeds was not planned; planned: 5, 10"):
        alpha_spent(7, [5, 10])


def test_two_planned_looks_find_a_true_null_in_at_most_one_of_twenty():
    rng = np.random.default_rng(11)
    x = rng.normal(0, 1, (4000, 10))
    first = stats.ttest_1samp(x[:, :5], 0, axis=1).pvalue < alpha_spent(5, [5, 10])
    last = stats.ttest_1samp(x, 0, axis=1).pvalue < alpha_spent(10, [5, 10])
    assert np.mean(first | last) < 0.05 + 3 * 0.0035


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    adjusted = holm([0.02, math.nan])
    assert adjusted[0] == 0.02
    assert math.isnan(adjusted[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(p):
    adjusted = holm(p)
    for raw, corrected in zip(p, adjusted, strict=True):
        assert raw <= corrected <= min(1.0, len(p) * raw) + 1e-12
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


def test_holm_keeps_the_family_wise_error():
    # Four true null hypotheses, tested at 5 %: any rejection is an error.
    p = np.random.default_rng(3).uniform(size=(2000, 4))
    errors = np.mean([min(holm(row)) < 0.05 for row in p])
    assert errors < 0.05 + 3 * 0.005
    assert np.mean(p.min(axis=1) < 0.05) > 0.15, "uncorrected, the error is three times as large"


def test_benjamini_and_hochberg_by_hand_and_by_scipy():
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    p = np.random.default_rng(0).uniform(size=30)
    assert benjamini_hochberg(p.tolist()) == pytest.approx(stats.false_discovery_control(p))
    assert math.isnan(benjamini_hochberg([0.01, math.nan])[1])
