"""Intervals against scipy and by coverage, comparisons by hand, Holm against its definition."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.comparison import (
    SMALLEST_DIFFERENCE,
    Interval,
    Paired,
    Sample,
    compare,
    compare_arms,
    harm_margin,
    holm,
    pooled_deviation,
    share_interval,
    t_interval,
)
from muonlab.errors import MuonlabError


def table(**losses):
    """Runs of one setting: arm -> losses of seeds 1, 2, ..."""
    rows = [
        {"arm": arm, "lr": 0.01, "seed": seed, "loss": loss, "status": "finished"}
        for arm, values in losses.items()
        for seed, loss in enumerate(values, 1)
    ]
    return pd.DataFrame(rows)


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


def test_the_noise_floor_pools_variances_by_degrees_of_freedom():
    groups = [np.array([1.0, 1.2]), np.array([2.0, 2.1, 2.2]), np.array([9.0])]
    # variances 0.02 (1 degree of freedom) and 0.01 (2 degrees)
    assert pooled_deviation(groups) == pytest.approx(math.sqrt((0.02 + 2 * 0.01) / 3))
    assert math.isnan(pooled_deviation(groups[2:]))


def test_the_noise_floor_leaves_diverged_runs_out():
    runs = table(a=[1.0, 1.2, 5.5], b=[1.0, 1.1, 1.2])
    runs.loc[2, "status"] = "diverged"
    assert compare_arms(runs, "a", "b").floor == pytest.approx(math.sqrt((0.02 + 2 * 0.01) / 3))


def test_paired_comparison_by_hand():
    # The seeds differ by far more than the arms: only pairing sees the difference.
    runs = table(muonclip=[1.00, 1.50, 2.00, 2.52], muon=[1.10, 1.60, 2.10, 2.60])
    paired = compare_arms(runs, "muonclip", "muon")
    assert paired.seeds == (1, 2, 3, 4)
    assert paired.differences == pytest.approx([-0.1, -0.1, -0.1, -0.08])
    assert paired.difference.estimate == pytest.approx(-0.095)
    assert paired.p == pytest.approx(
        stats.ttest_rel([1.00, 1.50, 2.00, 2.52], [1.10, 1.60, 2.10, 2.60]).pvalue
    )
    assert paired.direction(paired.p) == "tie", "the floor is the deviation of the seeds"


def test_a_comparison_uses_shared_seeds_and_keeps_the_diverged():
    runs = table(a=[1.0, 1.1, 5.5], b=[1.2, 1.3, 1.4, 1.5])
    runs.loc[2, "status"] = "diverged"
    paired = compare_arms(runs, "a", "b")
    assert paired.difference.n == 3
    assert paired.difference.estimate == pytest.approx((-0.2 - 0.2 + 4.1) / 3)
    assert paired.direction(paired.p) == "tie"


@pytest.mark.parametrize(
    ("interval", "p", "floor", "direction"),
    [
        (Interval(-0.02, -0.03, -0.01, 5), 0.01, 0.01, "lower"),
        (Interval(-0.02, -0.03, -0.01, 5), 0.01, 0.02, "tie"),
        (Interval(0.02, 0.01, 0.03, 5), 0.01, 0.02, "tie"),
        (Interval(0.03, 0.01, 0.05, 5), 0.01, 0.02, "higher"),
        (Interval(0.03, 0.01, 0.05, 5), 0.05, 0.02, "tie"),
        (Interval(-0.5, math.nan, math.nan, 1), math.nan, 0.01, "untested"),
    ],
)
def test_a_difference_inside_the_floor_or_with_a_large_p_is_a_tie(interval, p, floor, direction):
    paired = Paired(tuple(range(interval.n)), np.zeros(interval.n), interval, 0.0, floor)
    assert paired.direction(p) == direction


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6).filter(lambda x: np.ptp(x) > 1e-3))
def test_an_interval_without_zero_and_a_small_p_are_the_same(differences):
    values = dict(enumerate(differences))
    paired = compare(Sample(values), Sample(dict.fromkeys(values, 0.0)))
    excluded = paired.difference.low > 0 or paired.difference.high < 0
    assert excluded == (paired.p < 0.05) or abs(paired.p - 0.05) < 1e-9


def test_equal_arms_tie_and_one_pair_is_untested():
    same = compare_arms(table(a=[1.0, 1.1], b=[1.0, 1.1]), "a", "b")
    assert (same.p, same.direction(same.p)) == (1.0, "tie")
    constant = compare_arms(table(a=[1.5, 1.5], b=[1.0, 1.0]), "a", "b")
    assert (constant.p, constant.direction(0.0), constant.floor) == (0.0, "higher", SMALLEST_DIFFERENCE)
    single = compare_arms(table(a=[1.0], b=[2.0]), "a", "b")
    assert single.direction(single.p) == "untested"
    assert math.isnan(single.p)


def test_infinite_values_count_as_the_largest_finite_one():
    paired = compare(Sample({1: 2.0, 2: 2.1}), Sample({1: math.inf, 2: 3.0}))
    assert paired.differences == pytest.approx([2.0 - 3.0, 2.1 - 3.0])
    with pytest.raises(MuonlabError, match="every step is infinite"):
        compare(Sample({1: math.inf}), Sample({1: math.inf}), what="step")


def test_a_harmless_change_is_within_the_half_width_of_the_baseline():
    # Half-width 4.303 x 0.01 / sqrt(3) = 0.0248.
    assert harm_margin([2.00, 2.01, 2.02]) == pytest.approx(0.02484, abs=1e-5)
    assert harm_margin([2.0, 2.0, 2.0]) == SMALLEST_DIFFERENCE
    worse = compare(Sample({1: 2.0031, 2: 2.0031}), Sample({1: 2.0, 2: 2.0}))
    assert not worse.within(SMALLEST_DIFFERENCE)
    assert worse.within(0.0032)


def test_comparisons_that_cannot_be_made_say_why():
    runs = table(a=[1.0, 1.1], b=[1.2, 1.3])
    with pytest.raises(MuonlabError, match="no run of 'c'; arms: a, b"):
        compare_arms(runs, "c", "a")
    with pytest.raises(MuonlabError, match="several runs of seed 1"):
        compare_arms(pd.concat([runs, runs.head(1)]), "a", "b")
    with pytest.raises(MuonlabError, match="no seed in common"):
        compare_arms(runs[(runs["arm"] == "a") ^ (runs["seed"] == 2)], "a", "b")


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
