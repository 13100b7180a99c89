"""Each test of a run on traces made to satisfy it, to miss it by one condition, and to leave it open."""

import math

import numpy as np
import pandas as pd
import pytest

from analysis.run_tests import (
    bounded,
    capped,
    climbs,
    collapsed,
    ended_above_start,
    exploded,
    falls,
    recovered,
    spiked,
)

STEPS = np.arange(400)


def trace(values):
    return pd.Series(np.broadcast_to(np.asarray(values, float), STEPS.shape).copy(), index=STEPS)


class TestExploded:
    def test_a_growing_logit_explodes(self):
        outcome = exploded(trace(2 * np.exp(STEPS / 80)), warmup_steps=20)
        assert outcome.holds is True
        # The end is the median of the last 20 steps, steps 380 to 399.
        assert outcome.value == pytest.approx(np.exp((389.5 - 20) / 80), rel=1e-3)

    def test_growth_that_stopped_is_no_explosion(self):
        rising_then_falling = np.where(STEPS < 200, np.exp(STEPS / 40), np.exp(5 - (STEPS - 200) / 800))
        outcome = exploded(trace(rising_then_falling), warmup_steps=0)
        assert outcome.value > 10
        assert outcome.holds is False

    def test_slow_growth_is_no_explosion(self):
        assert exploded(trace(2 * np.exp(STEPS / 400)), warmup_steps=20).holds is False

    def test_growth_within_the_warmup_does_not_count(self):
        s = trace(np.where(STEPS < 100, np.exp(STEPS / 20), np.exp(5) * (1 + STEPS / 4000)))
        assert exploded(s, warmup_steps=0).holds is True
        assert exploded(s, warmup_steps=100).holds is False

    def test_infinite_logits_have_exploded(self):
        assert exploded(trace(np.where(STEPS > 300, np.inf, 3.0)), warmup_steps=20).holds is True

    @pytest.mark.parametrize("values", [trace(np.nan), trace(-1.0), trace(2.0).head(30)])
    def test_not_judged(self, values):
        outcome = exploded(values, warmup_steps=20)
        assert outcome.holds is None
        assert math.isnan(outcome.value)
        assert outcome.sentence.startswith("not judged")


class TestCapped:
    def test_within_a_tenth_of_tau(self):
        s = trace(np.minimum(np.exp(STEPS / 40), 32))
        outcome = capped(s, tau=30)
        assert (outcome.holds, outcome.value) == (True, 1.0)

    @pytest.mark.parametrize(("beyond", "holds"), [(10, True), (11, False)])
    def test_one_step_in_twenty_may_lie_beyond(self, beyond, holds):
        # Contact at step 199, so 200 steps are judged: ten of them are the twentieth that is allowed.
        s = trace(np.where(STEPS < 199, 10, 31))
        s.iloc[300 : 300 + beyond] = 40
        outcome = capped(s, tau=30)
        assert outcome.holds is holds
        assert outcome.value == pytest.approx(1 - beyond / 200)

    def test_the_contact_itself_is_not_counted(self):
        s = trace(np.where(STEPS == 100, 500, 20))
        assert capped(s, tau=30).value == 1.0

    def test_bounded_is_looser_but_has_a_ceiling(self):
        s = trace(np.where(STEPS < 100, 10, 38))
        assert capped(s, tau=30).holds is False
        assert bounded(s, tau=30).holds is True
        s.iloc[-1] = 46  # one step above 1.5 tau
        assert bounded(s, tau=30).holds is False
        assert bounded(trace(np.where(STEPS < 100, 10, 40)), tau=30).holds is False

    def test_an_explosion_is_not_capped(self):
        assert capped(trace(np.exp(STEPS / 50)), tau=30).holds is False

    def test_without_contact_there_is_nothing_to_cap(self):
        assert capped(trace(29.9), tau=30).holds is None
        assert capped(trace(np.where(STEPS < 395, 1, 31)), tau=30).holds is None


class TestRecovered:
    def test_below_tau_and_unclipped_to_the_end(self):
        s = trace(np.where((STEPS > 100) & (STEPS < 310), 31, 25))
        assert recovered(s, trace(1.0), tau=30).holds is True
        assert recovered(s, trace(np.nan), tau=30).holds is True, "an arm without a clip has no gamma"

    def test_one_clipped_or_one_high_step_is_enough_to_fail(self):
        s = trace(np.where((STEPS > 100) & (STEPS < 310), 31, 25))
        gamma = trace(1.0)
        gamma[350] = 0.99
        assert recovered(s, gamma, tau=30).holds is False
        s[350] = 30.0
        assert recovered(s, trace(1.0), tau=30).holds is False

    def test_not_judged_without_contact_or_too_short(self):
        assert recovered(trace(25), trace(1.0), tau=30).holds is None
        assert recovered(trace(25).head(40), trace(1.0).head(40), tau=30).holds is None


class TestSpikedAndDiverged:
    def noise(self):
        return trace(2.0) + 0.05 * np.random.default_rng(0).standard_normal(len(STEPS))

    def test_noise_is_no_spike_and_a_jump_of_a_nat_is_one(self):
        loss = self.noise()
        assert spiked(loss).holds is False
        loss[200] += 1.0
        outcome = spiked(loss)
        assert outcome.holds is True
        # One of the 350 steps after the first window of 50.
        assert outcome.value == pytest.approx(100 / 350)

    def test_a_drop_is_no_spike(self):
        loss = self.noise()
        loss[200] -= 1.0
        assert spiked(loss).holds is False

    def test_too_short_to_score(self):
        assert spiked(self.noise().head(40)).holds is None

    def test_divergence_is_above_the_first_loss_or_not_finite(self):
        falling = trace(np.linspace(5.5, 2, 400))
        assert ended_above_start(falling).holds is False
        for last in (5.6, math.inf, math.nan):
            loss = falling.copy()
            loss.iloc[-1] = last
            assert ended_above_start(loss).holds is True
        assert ended_above_start(falling.head(1)).holds is None
        assert ended_above_start(falling.head(0)).holds is None
        assert ended_above_start(trace(math.nan).head(1)).holds is True, (
            "the very first loss was not a number"
        )


class TestCollapsed:
    def heads(self, *entropies):
        rows = [{"step": 10, "layer": 0, "head": h, "entropy": 3.0} for h in range(len(entropies))]
        rows += [{"step": 20, "layer": 0, "head": h, "entropy": e} for h, e in enumerate(entropies)]
        return pd.DataFrame([*rows, {"step": 30, "layer": 0, "head": 0, "entropy": math.nan}])

    def test_half_of_the_heads_below_a_twentieth_of_uniform(self):
        # Uniform attention over 64 positions: mean of log 1 .. log 64 = 3.206 nats; a twentieth is 0.1603.
        assert collapsed(self.heads(0.16, 1.0), context=64).holds is True
        assert collapsed(self.heads(0.161, 1.0), context=64).holds is False
        assert collapsed(self.heads(0.01, 1.0, 1.0), context=64).value == pytest.approx(1 / 3)

    def test_without_readings_nothing_is_said(self):
        assert collapsed(self.heads(math.nan).assign(entropy=math.nan), context=64).holds is None
        assert collapsed(self.heads(0.1), context=math.nan).holds is None


class TestSwitch:
    def test_the_logit_climbs_within_reach(self):
        s = trace(np.where(STEPS <= 200, 30, 30 * np.exp((STEPS - 200) / 50)))
        assert climbs(s, at=200, within=50).holds is True
        assert climbs(s, at=200, within=50).value == pytest.approx(math.e)
        assert climbs(s, at=200, within=15).holds is False
        assert climbs(s, at=100, within=50).holds is False

    def test_the_loss_falls_within_reach(self):
        loss = trace(np.where(STEPS <= 300, 2.0, 1.9)).where(STEPS % 25 == 0)
        outcome = falls(loss, at=300, within=50)
        assert outcome.holds is True
        assert outcome.value == pytest.approx(-0.1)
        assert falls(loss, at=200, within=50).holds is False

    def test_not_judged_at_the_edges_or_between_readings(self):
        assert climbs(trace(30), at=397, within=50).holds is None
        assert falls(trace(2).where(STEPS % 100 == 0), at=210, within=20).holds is None
