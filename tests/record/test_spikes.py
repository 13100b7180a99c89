import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.errors import MuonlabError
from muonlab.record import detect_spikes, spike_score
from muonlab.record.score import score_run
from muonlab.record.spikes import DEFINITIONS, EVENT_COLUMNS, olmo2, rolling_2x, six_sigma, zclip

# Whole numbers: every sum is exact, so a loop and an array agree on which windows are flat.
values = st.integers(-30, 30).map(float)
series = st.lists(values | st.sampled_from([math.nan, math.inf, -math.inf, 1e6]), max_size=60)


def plain_heights(x, window, first, ddof, ratio=False):
    """The heights as the definitions read: one value after the other, against those before it."""
    heights = []
    for t, value in enumerate(x):
        before = [v for v in x[max(0, t - window) : t] if math.isfinite(v)]
        if t < first or len(before) < 2 or math.isnan(value):
            heights.append(math.nan)
            continue
        mean = sum(before) / len(before)
        sigma = math.sqrt(sum((v - mean) ** 2 for v in before) / (len(before) - ddof))
        above, scale = (value, mean) if ratio else (value - mean, sigma)
        if scale:
            heights.append(above / scale)
        else:
            heights.append(math.copysign(math.inf, above) if above else math.nan)
    return np.array(heights)


@settings(deadline=None)
@given(series, st.integers(2, 12))
def test_the_fast_definitions_equal_a_plain_loop(x, window):
    x = np.array(x)
    with np.errstate(all="ignore"):
        ours = [olmo2(x, window), six_sigma(x, window), rolling_2x(np.abs(x), window)]
    plain = [
        plain_heights(x, window, first=window, ddof=0),
        plain_heights(x, window, first=max(2, window // 2) - 1, ddof=1),
        plain_heights(np.abs(x), window, first=window, ddof=0, ratio=True),
    ]
    for measure, heights in zip(ours, plain, strict=True):
        np.testing.assert_allclose(measure.height, heights, rtol=1e-9, atol=1e-12)
    assert ((plain[0] > 7 + 1e-6) <= ours[0].spiked).all()
    assert (ours[0].spiked <= (plain[0] > 7 - 1e-6)).all()
    assert ((plain[0] < -7 - 1e-6) <= ours[0].dropped).all()
    assert (ours[0].dropped <= (plain[0] < -7 + 1e-6)).all()


def test_long_series_are_measured_in_pieces_that_do_not_show():
    rng = np.random.default_rng(0)
    x = rng.normal(size=2200)  # 1,048 windows of 1,000 make one piece
    np.testing.assert_allclose(olmo2(x, window=1000).height, plain_heights(x, 1000, 1000, 0), rtol=1e-9)


def test_a_huge_value_leaves_no_rounding_behind():
    rng = np.random.default_rng(0)
    quiet = rng.normal(size=300)
    shaken = quiet.copy()
    shaken[100] = 1e30
    after = slice(151, None)
    np.testing.assert_array_equal(olmo2(shaken, 50).height[after], olmo2(quiet, 50).height[after])


def test_olmo2_by_hand():
    # Mean 2, standard deviation 1: 9 is exactly seven of them above, and "at least" counts.
    x = [1.0, 3.0] * 25
    assert detect_spikes([*x, 9.0], "olmo2")["height"].tolist() == [7.0]
    assert detect_spikes([*x, 8.99], "olmo2").empty
    assert spike_score([*x, 9.0, 2.0], "olmo2") == 50.0
    assert spike_score([*x, -5.0, 2.0], "olmo2") == 50.0
    assert spike_score([*x, -5.0, 2.0], "olmo2", upward_only=True) == 0.0


def test_olmo2_takes_a_tenth_of_a_short_series_and_a_thousand_of_a_long_one():
    for length, window in ((60, 50), (499, 50), (700, 70), (9000, 900), (12_000, 1000)):
        height = olmo2(np.random.default_rng(0).normal(size=length)).height
        assert np.flatnonzero(~np.isnan(height))[0] == window


def test_six_sigma_by_hand():
    # Of 64 values, 32 times 1 and 3: mean 2, unbiased variance 64 / 63.
    x = [1.0, 3.0] * 32
    edge = 2 + 6 * math.sqrt(64 / 63)
    assert detect_spikes([*x, edge + 1e-9], "six_sigma")["step"].tolist() == [64]
    assert detect_spikes([*x, edge - 1e-9], "six_sigma").empty
    # OLMo-core begins once half of the 128 steps, the present one among them, are there.
    assert np.isnan(six_sigma(np.array(x)).height[:63]).all()
    assert not np.isnan(six_sigma(np.array(x)).height[63])


def test_rolling_2x_by_hand():
    x = [1.0, 3.0] * 50
    events = detect_spikes([*x, 4.0, 4.2], "rolling_2x")
    assert events["step"].tolist() == [101]  # 4 is twice the mean, not more; then the mean is 2.03
    assert events["height"].tolist() == pytest.approx([4.2 / 2.03])


def test_zclip_by_hand():
    x = np.array([1.0, 3.0, 10.0, 10.0, 2.0])
    measure = zclip(x, decay=0.5, sigmas=2.0, warmup=2)
    mean, variance, heights = 2.0, 1.0, []
    for value in x[2:]:
        z = (value - mean) / (math.sqrt(variance) + 1e-6)
        heights.append(z)
        taken = mean + 4 * math.sqrt(variance) / z if z > 2 else value
        mean = (mean + taken) / 2
        variance = (variance + (taken - mean) ** 2) / 2
    np.testing.assert_allclose(measure.height[2:], heights, rtol=1e-14)
    assert np.isnan(measure.height[:2]).all()
    # The spike enters the statistics clipped: were it to enter as it is, its repetition would be no spike.
    assert measure.spiked.tolist() == [False, False, True, True, False]


def test_an_event_lasts_until_the_series_is_back_to_normal():
    x = np.array([1.0, 3.0] * 40)
    x[60:65] = [20.0, 30.0, 25.0, 4.1, 4.0]  # normal: 2 + 2 sigma = 4
    events = detect_spikes(pd.Series(x, index=np.arange(100, 180)), "olmo2", window=50)
    assert events.to_dict("records") == [
        {"step": 160, "value": 20.0, "definition": "olmo2", "height": 18.0, "peak": 30.0, "duration": 4.0}
    ]


def test_a_spike_that_never_recovers_is_one_event_without_duration():
    x = np.array([1.0, 3.0] * 40)
    x[60:] = 50.0
    events = detect_spikes(x, "olmo2", window=50)
    assert len(events) == 1
    assert math.isnan(events["duration"][0])


def test_two_spikes_are_two_events():
    x = np.array([1.0, 3.0] * 60)
    x[[70, 100]] = 40.0
    # Against a window that holds the first, the second is no more than 6.9 standard deviations high.
    assert detect_spikes(x, "olmo2", window=50)["step"].tolist() == [70]
    assert detect_spikes(x, "olmo2", window=20)["step"].tolist() == [70, 100]


@pytest.mark.parametrize("definition", DEFINITIONS.names())
def test_nan_is_never_a_spike_and_infinity_always(definition):
    x = np.array([1.0, 3.0] * 80)
    x[140] = math.nan
    x[[150, 155]] = math.inf
    events = detect_spikes(x, definition)
    assert events["step"].tolist() == [150, 155]
    assert events["height"].tolist() == events["peak"].tolist() == [math.inf, math.inf]
    assert events["duration"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("definition", DEFINITIONS.names())
@pytest.mark.parametrize("x", [[], [1.0], [1.0] * 300, [math.nan] * 300, list(np.linspace(5, 2, 300))])
def test_quiet_and_short_series_have_no_spikes(definition, x):
    events = detect_spikes(x, definition)
    assert events.empty
    assert events.dtypes.astype(str).to_dict() == EVENT_COLUMNS
    score = spike_score(x, definition)
    assert score == 0 or math.isnan(score)


def test_a_rise_from_a_flat_line_is_infinitely_high():
    assert detect_spikes([2.0] * 60 + [2.1], "olmo2")["height"].tolist() == [math.inf]


def test_what_cannot_be_scored_gives_one_sentence():
    with pytest.raises(MuonlabError, match="unknown spike definition 'olmo'; did you mean 'olmo2'"):
        detect_spikes([1.0], "olmo")
    with pytest.raises(MuonlabError, match="unknown spike definition setting 'sigma'; did you mean"):
        detect_spikes([1.0], "zclip", sigma=3)
    with pytest.raises(MuonlabError, match=r"one-dimensional, not of shape \(2, 2\)"):
        spike_score([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(MuonlabError, match="at least 2 steps, not 1"):
        detect_spikes([1.0, 2.0], "olmo2", window=1)


def test_a_run_is_scored_on_measured_values_only():
    loss = [1.0, 3.0] * 60
    loss[100] = 50.0
    loss.append(None)  # a last row with a validation loss alone
    steps = pa.table({"step": range(121), "train_loss": loss, "grad_norm": pa.nulls(121, pa.float64())})
    events, scores = score_run(steps)
    by_definition = events.set_index("definition")
    assert sorted(by_definition.index) == ["olmo2", "rolling_2x", "six_sigma"]
    assert (events["step"] == 100).all()
    assert (events["series"] == "train_loss").all()
    assert scores["olmo2/train_loss"] == scores["olmo2_upward/train_loss"] == pytest.approx(100 / 70)
    assert math.isnan(scores["zclip/grad_norm"])
