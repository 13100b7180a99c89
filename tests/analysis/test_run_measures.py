"""Measures of one run against traces whose answer is known by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.measures import MEASURES, Part, read_quantity
from analysis.measures.runs import first_crossing
from muonlab.errors import MuonlabError
from muonlab.record.spikes import olmo2

N = 101


def measured(text, part):
    return read_quantity(text).value(part)


def part(status="finished", level=math.nan, initial_loss=5.0, warmup_steps=10, **columns):
    """A run of 101 steps, 10 tokens each; columns are arrays over its steps."""
    steps = pd.DataFrame(
        {"step": np.arange(N), "tokens": 10.0 * (np.arange(N) + 1), "seconds": np.arange(N) / 2.0}
    )
    steps = steps.assign(condition="c", run="r", flops=1e6 * steps["tokens"], **columns)
    row = {"condition": "c", "run": "r", "status": status, "level": level, "lr": 0.01, "loss": 2.0}
    runs = pd.DataFrame([row | {"initial_loss": initial_loss, "warmup_steps": warmup_steps}])
    return Part(runs, steps)


FALLING = 5.0 - 0.03 * np.arange(N)  # 5 at the start, 2 at the end


@pytest.mark.parametrize(("name", "scale"), [("steps", 1), ("tokens", 10), ("flops", 1e7), ("seconds", 0.5)])
def test_a_target_is_reached_between_two_readings(name, scale):
    probe = np.where(np.arange(N) % 10 == 0, FALLING, np.nan)
    offset = scale if name in ("tokens", "flops") else 0
    found = measured({"name": f"{name}_to_target", "target": 3.95}, part(probe_loss=probe))
    assert found == pytest.approx((35 * scale + offset,) * 2), "5 - 0.03 x 35 = 3.95, between steps 30 and 40"
    never, spent = measured({"name": f"{name}_to_target", "target": 1.0}, part(probe_loss=probe))
    assert math.isinf(never)
    assert spent == pytest.approx(100 * scale + offset), "a target that was never reached cost the whole run"


@given(st.floats(0.1, 10), st.floats(0.05, 0.95))
def test_crossing_of_a_line_is_exact(slope, share):
    readings = pd.Series(10 - slope * np.arange(21), index=np.arange(0, 105, 5))
    target = 10 - slope * 20 * share
    assert first_crossing(readings, target) == pytest.approx(100 * share)


def test_crossing_at_the_first_reading_after_an_infinite_one_and_never():
    assert first_crossing(pd.Series([1.0, 0.5], index=[3, 4]), 2.0) == 3
    assert first_crossing(pd.Series([math.inf, 0.5], index=[3, 8]), 1.0) == 8
    assert first_crossing(pd.Series([math.nan, 3.0], index=[3, 8]), 1.0) == math.inf


def test_a_value_at_a_step_or_a_share():
    run = part(probe_loss=FALLING)
    assert measured({"name": "value_at", "share": 0.5}, run)[0] == pytest.approx(3.5)
    assert measured({"name": "value_at", "step": 10}, run)[0] == pytest.approx(4.7)
    assert measured({"name": "change", "start": 10, "stop": 20}, run)[0] == pytest.approx(-0.3)
    grown = part(max_logit=np.exp(np.arange(N) / 50))
    growth = {"name": "change", "start": 0, "stop": 100, "column": "max_logit", "log": True}
    assert measured(growth, grown)[0] == pytest.approx(2.0)
    with pytest.raises(MuonlabError, match="either `share` or `step`"):
        measured("value_at", run)


def test_a_diverged_run_counts_with_its_first_loss_beyond_its_end():
    run = part(status="diverged", probe_loss=FALLING, max_logit=np.linspace(1, 9, N))
    assert measured({"name": "value_at", "step": 500}, run) == (math.inf, 5.0)
    assert measured({"name": "value_at", "step": 500, "column": "max_logit"}, run) == (math.inf, 9.0)
    assert measured({"name": "value_at", "step": 500}, part(probe_loss=FALLING))[0] == pytest.approx(2.0)


def test_rise_and_fall():
    rise_and_fall = np.concatenate([np.linspace(1, 100, 51), np.linspace(98, 50, 50)])
    run = part(max_logit=rise_and_fall)
    end = np.median(rise_and_fall[-5:])
    assert measured({"name": "end", "column": "max_logit"}, run)[0] == end
    assert measured({"name": "peak", "column": "max_logit"}, run)[0] == 100
    assert measured("peak_over_end", run)[0] == pytest.approx(100 / end)
    assert measured("growth", run)[0] == pytest.approx(end / rise_and_fall[10])
    assert measured("peak_over_end", part(max_logit=np.full(N, 7.0)))[0] == 1.0
    assert math.isnan(measured("growth", part(max_logit=rise_and_fall, warmup_steps=500))[0])
    whole = measured("growth", part(max_logit=rise_and_fall, warmup_steps=math.nan))[0]
    assert whole == pytest.approx(end), "without a schedule the first reading counts"


def test_a_column_read_at_a_cadence_ends_with_its_last_readings():
    sparse = np.where(np.arange(N) % 40 == 0, np.arange(N), np.nan)
    assert measured({"name": "end", "column": "s"}, part(s=sparse))[0] == 80
    both = part(**{"w/a": sparse, "w/b": 2 * sparse})
    assert measured({"name": "end", "column": "w/*"}, both)[0] == 160
    assert measured({"name": "end", "column": "w/*", "over": "mean"}, both)[0] == 120
    assert measured({"name": "average", "column": "w/a"}, both)[0] == pytest.approx(40)
    for column in ("x", "x/*"):
        with pytest.raises(MuonlabError, match="recorded column"):
            measured({"name": "end", "column": column}, both)
    with pytest.raises(MuonlabError, match="never recorded in r"):
        measured({"name": "end", "column": "e"}, part(e=np.full(N, np.nan)))


def test_excess_loss_sees_the_slow_divergence_that_a_spike_score_misses():
    assert measured("excess_loss", part(train_loss=FALLING))[0] == 0.0
    bowl = np.concatenate([np.linspace(5, 2, 51), np.linspace(2, 4, 50)])
    assert measured("excess_loss", part(train_loss=bowl))[0] > 0.2
    shifted = np.where(np.arange(N) < 50, 2.0, 3.0)
    found = measured({"name": "excess_loss", "window": 1}, part(train_loss=shifted))[0]
    assert found == pytest.approx(51 / N), "one nat above the minimum in 51 of 101 steps"


def test_the_rate_at_which_a_ramp_fails():
    rates = 1e-3 * 10 ** (np.arange(N) / 50)
    bowl = np.concatenate([np.linspace(5, 2, 51), np.linspace(2.02, 3, 50)])
    run = part(probe_loss=bowl, scheduled_lr=rates)
    first = int(np.flatnonzero(bowl > np.minimum.accumulate(bowl) + 0.3)[0])
    assert measured("rate_at_failure", run)[0] == pytest.approx(rates[first])
    assert measured("rate_at_failure", part(probe_loss=FALLING, scheduled_lr=rates)) == (math.inf, rates[-1])
    lost = part(status="diverged", probe_loss=FALLING, scheduled_lr=rates)
    assert measured("rate_at_failure", lost)[0] == rates[-1]


def test_the_last_clip_as_a_share_of_the_run():
    gamma = np.where(np.arange(N) <= 30, 0.9, 1.0)
    assert measured("last_clip", part(gamma=gamma))[0] == pytest.approx(0.3)
    assert measured("last_clip", part(gamma=np.ones(N)))[0] == 0.0


def test_a_name_that_is_no_measure_is_a_column_of_the_runs():
    assert measured("loss", part()) == (2.0, 2.0)
    assert (read_quantity("loss").unit, read_quantity({"name": "tokens_to_target", "target": 1}).unit) == (
        "nats",
        "tokens",
    )
    assert read_quantity({"name": "lr_sensitivity"}).unit == "nats"
    assert (
        read_quantity({"name": "bowl_depth", "of": {"name": "steps_to_target", "target": 1}}).unit == "steps"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("peek", "did you mean 'peak'"),
        ({"name": "peak"}, "measure peak needs 'column'"),
        ({"name": "peak", "colum": "x"}, "did you mean 'column'"),
        ({"name": "best", "of": "best"}, "unknown measure 'best'"),
        ({"name": "best", "of": {"name": "peak"}}, "measure peak needs 'column'"),
        ({"name": "loss", "column": "x"}, "unknown measure 'loss'"),
        ({"name": "compute_ratio", "of": "loss"}, "setting of measure compute_ratio"),
    ],
)
def test_misspelt_measures_and_settings_are_reported(given, message):
    with pytest.raises(MuonlabError, match=message):
        read_quantity(given)


def test_every_measure_says_what_it_is():
    for measure in MEASURES.values():
        assert measure.function.__doc__
        assert measure.source
        assert measure.kind in ("run", "sweep", "pair")


def test_a_spike_is_found_from_the_smallest_height_on_and_not_below_it():
    noise = np.random.default_rng(0).normal(3.0, 0.05, N)
    height = measured({"name": "smallest_spike"}, part(train_loss=noise))[0]
    assert height == pytest.approx(7 * 0.05, rel=0.3)
    before = noise[30:80]
    assert measured({"name": "smallest_spike", "sigmas": 1}, part(train_loss=noise))[0] == pytest.approx(
        height / 7
    )
    found = []
    for factor in (0.7, 1.4):
        spiked = noise.copy()
        spiked[80] = before.mean() + factor * height
        found.append(bool(olmo2(spiked, window=50).spiked[80]))
    assert found == [False, True]
