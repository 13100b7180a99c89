"""Measures over levels and of two arms against closed forms."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.measures import MEASURES, Part, read_quantity
from analysis.measures.scaling import (
    bootstrap_ratio,
    compute_at_equal_loss,
    fit_power_law,
    interpolated_ratios,
)
from muonlab.errors import MuonlabError


def measured(text, part):
    return read_quantity(text).value(part)


def call(name, values, **settings):
    return MEASURES[name].function(pd.Series(values, dtype=float), **settings)


def sizes(losses, flops, seed=1, levels=None, condition="c"):
    """One run a size, with a loss and what it cost."""
    names = [f"r{i}" for i in range(len(losses))]
    shared = {"condition": condition, "run": names}
    runs = pd.DataFrame(shared | {"level": levels or flops, "lr": 0.01, "loss": losses, "flops": flops})
    steps = pd.DataFrame(shared | {"step": 0, "probe_loss": losses, "max_logit": losses})
    return Part(runs.assign(seed=seed, status="finished"), steps)


def test_sensitivity_is_the_mean_distance_from_the_best():
    assert call("lr_sensitivity", {0.001: 3.0, 0.01: 2.0, 0.1: 2.5, 1.0: 5.0}) == pytest.approx(1.125)
    assert call("lr_sensitivity", {0.001: 2.0, 0.1: 2.0}) == 0.0


def test_the_optimum_and_the_bowl():
    bowl = {1: 3.0, 2: 2.0, 4: 2.5}
    assert (call("best", bowl), call("best_level", bowl), call("bowl_depth", bowl)) == (2.0, 2.0, 0.5)
    assert call("bowl_depth", {1: 1.0, 2: 2.0, 4: 3.0}) == 0.0, "the minimum is an end"
    assert call("bowl_depth", {1: math.inf, 2: 2.0, 4: math.inf}) == math.inf
    assert call("spread", bowl) == 1.0
    assert call("spread", bowl, above=2) == 0.5
    assert call("contrast", bowl, high=4, low=1) == -0.5
    assert call("ratio", bowl, high=4, low=2) == 1.25
    assert MEASURES["contrast"].function(pd.Series({"on": 3.0, "off": 1.0}), high="on", low="off") == 2.0
    with pytest.raises(MuonlabError, match=r"no level 8; levels: 1\.0, 2\.0, 4\.0"):
        MEASURES["ratio"].function(pd.Series([3.0, 2.0, 2.5], index=[1.0, 2.0, 4.0]), high=8, low=2)
    with pytest.raises(MuonlabError, match="are not numbers"):
        MEASURES["best_level"].function(pd.Series({"on": 3.0, "off": 1.0}))


@given(st.floats(-3, 3), st.floats(0.1, 10))
def test_the_slope_of_a_power_law_is_its_exponent(exponent, factor):
    x = np.array([1.0, 3.0, 10.0, 100.0])
    assert call("slope", dict(zip(x, factor * x**exponent, strict=True))) == pytest.approx(exponent, abs=1e-9)


def test_the_slope_leaves_out_what_is_infinite_and_needs_three():
    assert call("slope", {1: 1.0, 2: 2.0, 4: 4.0, 8: math.inf}) == pytest.approx(1.0)
    assert math.isnan(call("slope", {1: 1.0, 2: 2.0, 4: math.inf}))
    assert call("slope", {1: 0.0, math.e: 2.0, math.e**2: 4.0}, log=False) == pytest.approx(2.0)


def test_rank_correlation():
    assert call("rank_correlation", {1: 5.0, 2: 7.0, 3: 8.0}) == pytest.approx(1.0)
    assert call("rank_correlation", {1: 9.0, 2: 7.0, 3: 8.0}) == pytest.approx(-0.5)


def test_a_quadratic_in_the_logarithm_is_extrapolated_exactly():
    x = np.array([1.0, 2.0, 5.0, 9.0, 30.0])
    y = np.exp(0.3 + 0.2 * np.log(x) + 0.1 * np.log(x) ** 2)
    assert call("extrapolation_factor", dict(zip(x, y, strict=True))) == pytest.approx(1.0)
    y[-1] *= 3
    assert call("extrapolation_factor", dict(zip(x, y, strict=True))) == pytest.approx(3.0)
    y[-1] /= 9
    assert call("extrapolation_factor", dict(zip(x, y, strict=True))) == pytest.approx(3.0), (
        "too low counts too"
    )
    assert math.isnan(call("extrapolation_factor", dict(zip(x[:3], y[:3], strict=True))))


def test_levels_come_in_their_order_and_default_to_the_learning_rate():
    part = sizes([3.0, 1.0, 2.0], [30.0, 10.0, 20.0])
    assert [level.level for level in part.levels] == [10.0, 20.0, 30.0]
    assert measured({"name": "best_level"}, part)[0] == 10.0
    assert measured({"name": "bowl_depth", "of": {"name": "end", "column": "max_logit"}}, part)[0] == 0.0
    named = sizes([3.0, 1.0], [1.0, 2.0], levels=["b", "a"])
    assert [level.level for level in named.levels] == ["b", "a"], "names keep the file's order"
    text = sizes([3.0, 1.0], [1.0, 2.0], levels=["30", "4"])
    assert [level.level for level in text.levels] == [4.0, 30.0], "as a CSV file reads back"
    rates = sizes([3.0, 1.0], [1.0, 2.0], levels=[math.nan] * 2)
    with pytest.raises(MuonlabError, match=r"several runs have the level 0\.01"):
        _ = rates.levels
    with pytest.raises(MuonlabError, match=r"was given 3; choose one of the levels 30\.0, 10\.0, 20\.0"):
        measured("loss", part)


COMPUTE = np.array([1e9, 3e9, 1e10, 3e10])


def test_moonlights_printed_fits_give_its_saving():
    # arXiv 2502.16982, Fig 1a: 2.506 C^-0.052 for Muon, 2.608 C^-0.054 for AdamW, C in PFLOP/s-days.
    c = np.array([0.3, 1.0, 3.0])
    muon, adamw = fit_power_law(c, 2.506 * c**-0.052), fit_power_law(c, 2.608 * c**-0.054)
    assert (muon.coefficient, muon.exponent) == pytest.approx((2.506, 0.052))
    by_hand = (2.506 / (2.608 * 3.0**-0.054)) ** (1 / 0.052) / 3.0
    assert compute_at_equal_loss(muon, adamw, 3.0) == pytest.approx(by_hand)
    assert 0.4 < by_hand < 0.6


def test_half_the_compute_at_every_size_is_a_ratio_of_one_half_without_a_trend():
    baseline = sizes(5 * COMPUTE**-0.05, COMPUTE)
    arm = sizes(5 * (2 * COMPUTE) ** -0.05, COMPUTE)
    assert MEASURES["compute_ratio"].function(arm, baseline) == pytest.approx(0.5)
    assert MEASURES["compute_ratio"].function(arm, baseline, at=1e8) == pytest.approx(0.5)
    assert MEASURES["compute_ratio_trend"].function(arm, baseline) == pytest.approx(0.0, abs=1e-9)
    steeper = sizes(5 * COMPUTE**-0.04, COMPUTE)
    assert MEASURES["compute_ratio_trend"].function(steeper, baseline) == pytest.approx(0.25)
    with pytest.raises(MuonlabError, match="two or more computes"):
        MEASURES["compute_ratio"].function(sizes([2.0], [1e9]), baseline)


def test_the_bootstrap_covers_the_true_ratio_about_as_often_as_it_says():
    noise, hits = np.random.default_rng(0), 0
    for _ in range(40):
        arm = (5 * (2 * COMPUTE) ** -0.05)[:, None] * np.exp(0.002 * noise.standard_normal((4, 8)))
        baseline = (5 * COMPUTE**-0.05)[:, None] * np.exp(0.002 * noise.standard_normal((4, 8)))
        interval = bootstrap_ratio(arm, baseline, COMPUTE, at=COMPUTE[-1], resamples=100)
        hits += interval.low < 0.5 < interval.high
    assert 30 <= hits <= 40, "95 % in theory, a little less with eight seeds"
    assert bootstrap_ratio(arm, baseline, COMPUTE, 1e9, 20) == bootstrap_ratio(
        arm, baseline, COMPUTE, 1e9, 20
    )


def test_interpolated_ratios_are_the_laws_where_the_points_lie_on_laws():
    compute = np.geomspace(1e9, 1e12, 5)
    arm, baseline = 40.0 * compute**-0.13, 30.0 * compute**-0.11
    order = np.array([3, 0, 4, 1, 2])
    at, ratios = interpolated_ratios((compute[order], arm[order]), (compute, baseline))
    law, reference = fit_power_law(compute, arm), fit_power_law(compute, baseline)
    within = (baseline <= arm.max()) & (baseline >= arm.min())
    assert at.tolist() == compute[within].tolist()
    assert 2 <= within.sum() < 5
    np.testing.assert_allclose(ratios, [compute_at_equal_loss(law, reference, c) for c in at], rtol=1e-9)


def test_interpolation_refuses_what_it_cannot_read_off():
    compute = np.array([1.0, 2.0, 4.0])
    falling, rising = np.array([3.0, 2.0, 1.0]), np.array([3.0, 2.0, 2.5])
    with pytest.raises(MuonlabError, match="does not fall with every size"):
        interpolated_ratios((compute, rising), (compute, falling))
    with pytest.raises(MuonlabError, match="none of the baseline's losses"):
        interpolated_ratios((compute, falling), (compute, falling + 5))
