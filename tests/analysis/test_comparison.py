"""Comparisons of two arms, by hand and against their definitions."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.comparison import LOSS_MARGIN, Sample, compare, compare_arms, pooled_deviation
from muonlab.errors import MuonlabError


def table(**losses):
    """Runs of one setting: arm -> losses of seeds 1, 2, ..."""
    rows = [
        {"arm": arm, "lr": 0.01, "seed": seed, "loss": loss, "status": "finished"}
        for arm, values in losses.items()
        for seed, loss in enumerate(values, 1)
    ]
    return pd.DataFrame(rows)


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
    assert paired.word(paired.p) == "lower"
    assert paired.detectable < 0.095


def test_a_comparison_uses_shared_seeds_and_keeps_the_diverged():
    runs = table(a=[1.0, 1.1, 5.5], b=[1.2, 1.3, 1.4, 1.5])
    runs.loc[2, "status"] = "diverged"
    paired = compare_arms(runs, "a", "b")
    assert paired.difference.n == 3
    assert paired.difference.estimate == pytest.approx((-0.2 - 0.2 + 4.1) / 3)
    assert paired.word(paired.p) == "unresolved"


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([-0.02, -0.03, -0.025], "lower"),
        ([0.02, 0.03, 0.025], "higher"),
        ([0.02, 0.10, -0.05], "unresolved"),
        ([0.001, 0.0012, 0.0011], "equal"),  # surely not zero, and smaller than matters
        ([0.0001, -0.0002, 0.0001], "equal"),
        ([-0.5], "untested"),
    ],
)
def test_a_difference_has_a_direction_a_margin_or_neither(differences, word):
    paired = compare(
        Sample(dict(enumerate(differences))), Sample(dict.fromkeys(range(len(differences)), 0.0))
    )
    assert paired.word(paired.p) == word
    if word in ("lower", "higher"):
        assert paired.word(0.05) == "unresolved", "corrected over others"


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6).filter(lambda x: np.ptp(x) > 1e-3))
def test_an_interval_without_zero_and_a_small_p_are_the_same(differences):
    values = dict(enumerate(differences))
    paired = compare(Sample(values), Sample(dict.fromkeys(values, 0.0)))
    excluded = paired.difference.low > 0 or paired.difference.high < 0
    assert excluded == (paired.p < 0.05) or abs(paired.p - 0.05) < 1e-9


def test_equal_arms_are_equal_and_one_pair_is_untested():
    same = compare_arms(table(a=[1.0, 1.1], b=[1.0, 1.1]), "a", "b")
    assert (same.p, same.word(same.p)) == (1.0, "equal")
    constant = compare_arms(table(a=[1.5, 1.5], b=[1.0, 1.0]), "a", "b")
    assert (constant.p, constant.word(0.0), constant.floor) == (0.0, "higher", 0.0)
    single = compare_arms(table(a=[1.0], b=[2.0]), "a", "b")
    assert single.word(single.p) == "untested"
    assert math.isnan(single.p)
    assert LOSS_MARGIN == 0.003


def test_infinite_values_count_as_the_largest_finite_one():
    paired = compare(Sample({1: 2.0, 2: 2.1}), Sample({1: math.inf, 2: 3.0}))
    assert paired.differences == pytest.approx([2.0 - 3.0, 2.1 - 3.0])
    with pytest.raises(MuonlabError, match="every step is infinite"):
        compare(Sample({1: math.inf}), Sample({1: math.inf}), what="step")


def test_comparisons_that_cannot_be_made_say_why():
    runs = table(a=[1.0, 1.1], b=[1.2, 1.3])
    with pytest.raises(MuonlabError, match="no run of 'c'; arms: a, b"):
        compare_arms(runs, "c", "a")
    with pytest.raises(MuonlabError, match="several runs of seed 1"):
        compare_arms(pd.concat([runs, runs.head(1)]), "a", "b")
    with pytest.raises(MuonlabError, match="no seed in common"):
        compare_arms(runs[(runs["arm"] == "a") ^ (runs["seed"] == 2)], "a", "b")
