"""Spikes of a difference: those of the batch cancel, the arm's own do not, and smaller ones are seen."""

import numpy as np
import pandas as pd
import pytest

from analysis.measures import Part, read_quantity
from muonlab.record.spikes import spike_score

STEPS = 300


def part(loss):
    named = {"condition": "c", "run": "r"}
    steps = pd.DataFrame({"step": np.arange(len(loss)), "train_loss": loss}).assign(**named)
    return Part(pd.DataFrame([named | {"status": "finished"}]), steps)


@pytest.fixture
def batches():
    """The loss that any arm has on each batch: noise of 0.05 nats, and one hard batch at step 200."""
    noise = np.random.default_rng(0).normal(3.0, 0.05, STEPS)
    noise[200] += 1.0
    return noise


def own(seed):
    return np.random.default_rng(seed).normal(0.0, 0.004, STEPS)


def of_pair(name, arm, baseline):
    return read_quantity(name).of_pair(part(arm), part(baseline))


def test_a_hard_batch_is_a_spike_of_the_loss_but_not_of_the_arm(batches):
    arm, baseline = batches + own(1), batches + own(2)
    assert of_pair("own_spike_score", arm, baseline) == 0.0
    assert spike_score(pd.Series(arm), "olmo2", window=50) > 0


def test_a_spike_that_only_one_arm_has_is_its_own_though_smaller_than_the_noise(batches):
    arm, baseline = batches + own(1), batches + own(2)
    arm[120] += 0.08  # 1.6 deviations of the batches' noise
    assert of_pair("own_spike_score", arm, baseline) == pytest.approx(100 / (STEPS - 50))
    assert of_pair("own_spike_score", baseline, arm) == 0.0, "the other arm fell, it did not spike"


def test_the_smallest_spike_is_seven_deviations_of_the_difference(batches):
    seen = of_pair("smallest_own_spike", batches + own(1), batches + own(2))
    assert seen == pytest.approx(7 * 0.004 * np.sqrt(2), rel=0.1)


def test_only_shared_steps_count_and_short_runs_have_no_score(batches):
    assert of_pair("own_spike_score", batches[:120] + own(1)[:120], batches + own(2)) == 0.0
    assert np.isnan(of_pair("own_spike_score", batches[:40], batches[:40]))
