"""Intervals against scipy and by coverage, comparisons by hand, Holm against its definition."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.statistics import (
    SMALLEST_DIFFERENCE,
    Interval,
    compare,
    holm,
    is_tie,
    noise_floor,
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


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_t_interval_equals_scipys(confidence):
    x = [1.2, 1.5, 0.9, 1.1]
    ours = t_interval(x, confidence)
    theirs = stats.ttest_1samp(x, 0).confidence_interval(confidence)
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
    assert not interval.excludes_zero()
    assert str(interval) == "1.500 (n=1)"
    assert str(Interval(1.0, 0.9, 1.1, 3)) == "1.000 [0.900, 1.100]"


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_values_that_are_not_finite_are_refused(values):
    with pytest.raises(MuonlabError, match="finite"):
        t_interval(values)


def test_noise_floor_pools_variances_by_degrees_of_freedom():
    runs = table(a=[1.0, 1.2], b=[2.0, 2.1, 2.2], c=[9.0])
    # variances 0.02 (1 degree of freedom) and 0.01 (2 degrees)
    assert noise_floor(runs) == pytest.approx(math.sqrt((0.02 + 2 * 0.01) / 3))
    assert math.isnan(noise_floor(table(c=[9.0])))


def test_noise_floor_leaves_diverged_runs_out():
    runs = table(a=[1.0, 1.2, 5.5])
    runs.loc[2, "status"] = "diverged"
    assert noise_floor(runs) == pytest.approx(math.sqrt(0.02))


def test_paired_comparison_by_hand():
    # The seeds differ by far more than the arms: only pairing sees the difference.
    runs = table(muonclip=[1.00, 1.50, 2.00, 2.52], muon=[1.10, 1.60, 2.10, 2.60])
    found = compare(runs, "muonclip", "muon", floor=0.01)
    assert found.difference.estimate == pytest.approx(-0.095)
    assert found.p == pytest.approx(
        stats.ttest_rel([1.00, 1.50, 2.00, 2.52], [1.10, 1.60, 2.10, 2.60]).pvalue
    )
    assert found.verdict == "lower"
    assert compare(runs, "muon", "muonclip", floor=0.01).verdict == "higher"
    assert compare(runs, "muon", "muonclip").verdict == "tie", "the measured floor is the seeds' deviation"


def test_comparison_uses_shared_seeds_and_keeps_the_diverged():
    runs = table(a=[1.0, 1.1, 5.5], b=[1.2, 1.3, 1.4, 1.5])
    runs.loc[2, "status"] = "diverged"
    found = compare(runs, "a", "b")
    assert found.difference.n == 3
    assert found.difference.estimate == pytest.approx((-0.2 - 0.2 + 4.1) / 3)
    assert found.verdict == "tie"


@pytest.mark.parametrize(
    ("interval", "floor", "tie"),
    [
        (Interval(-0.02, -0.03, -0.01, 5), 0.01, False),
        (Interval(-0.02, -0.03, -0.01, 5), 0.02, True),
        (Interval(0.02, 0.01, 0.03, 5), 0.02, True),
        (Interval(-0.5, -1.1, 0.1, 3), 0.01, True),
        (Interval(-0.5, math.nan, math.nan, 1), 0.01, True),
    ],
)
def test_a_difference_inside_the_floor_or_an_interval_with_zero_is_a_tie(interval, floor, tie):
    assert is_tie(interval, floor) is tie


def test_equal_arms_tie_and_one_pair_is_untested():
    same = compare(table(a=[1.0, 1.1], b=[1.0, 1.1]), "a", "b")
    assert (same.p, same.verdict) == (1.0, "tie")
    constant = compare(table(a=[1.5, 1.5], b=[1.0, 1.0]), "a", "b")
    assert (constant.p, constant.verdict, constant.floor) == (0.0, "higher", SMALLEST_DIFFERENCE)
    single = compare(table(a=[1.0], b=[2.0]), "a", "b")
    assert single.verdict == "untested"
    assert math.isnan(single.p)


def test_comparisons_that_cannot_be_made_say_why():
    runs = table(a=[1.0, 1.1], b=[1.2, 1.3])
    with pytest.raises(MuonlabError, match="no run of 'c'; arms: a, b"):
        compare(runs, "c", "a")
    with pytest.raises(MuonlabError, match="several runs of seed 1"):
        compare(pd.concat([runs, runs.head(1)]), "a", "b")
    with pytest.raises(MuonlabError, match="no seed in common"):
        compare(runs[(runs["arm"] == "a") ^ (runs["seed"] == 2)], "a", "b")


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
