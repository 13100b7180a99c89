"""The momentum forms against their closed sums in fp64, with fixed and with scheduled momentum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.optim import newton_schulz
from muonlab.optim.muon_rule import MOMENTUM_KINDS

MOMENTA = st.lists(st.floats(0, 0.99), min_size=1, max_size=8)


def gradients(steps):
    generator = torch.Generator().manual_seed(steps)
    return [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(steps)]


def directions(kind, momenta, nesterov):
    state = {"momentum_buffer": torch.zeros(3, 4, dtype=torch.float64)}
    grads = gradients(len(momenta))
    run = [
        MOMENTUM_KINDS[kind]([g], [state], mu, nesterov)[0].clone()
        for g, mu in zip(grads, momenta, strict=True)
    ]
    return run[-1], grads


def weighted(grads, weights):
    return sum(w * g for w, g in zip(weights, grads, strict=True))


def product(values):
    out = 1.0
    for value in values:
        out *= value
    return out


def buffer_weights(kind, momenta):
    """The weight of every past gradient in the buffer: its own share, then one mu per later step."""
    enters = [1 - mu if kind != "heavy_ball" else 1.0 for mu in momenta]
    return [enter * product(momenta[i + 1 :]) for i, enter in enumerate(enters)]


@settings(deadline=None)
@given(MOMENTA)
@pytest.mark.parametrize("kind", MOMENTUM_KINDS)
def test_the_buffer_is_the_stated_weighted_sum_under_any_schedule(kind, momenta):
    direction, grads = directions(kind, momenta, nesterov=False)
    torch.testing.assert_close(direction, weighted(grads, buffer_weights(kind, momenta)), rtol=0, atol=1e-12)


@settings(deadline=None)
@given(MOMENTA)
@pytest.mark.parametrize("kind", MOMENTUM_KINDS)
def test_nesterov_adds_the_gradient_once_more_in_the_stated_share(kind, momenta):
    direction, grads = directions(kind, momenta, nesterov=True)
    mu = momenta[-1]
    ahead, past = {"ema": (1 - mu, mu), "heavy_ball": (1.0, mu)}.get(kind, (0.0, 0.0))
    if kind == "ema_corrected":
        ahead = (1 - mu) / (1 - product(momenta))
        past = mu / (1 - product([*momenta, mu]))
    weights = [past * w for w in buffer_weights(kind, momenta)]
    weights[-1] += ahead
    torch.testing.assert_close(direction, weighted(grads, weights), rtol=0, atol=1e-11)


@settings(deadline=None)
@given(st.floats(0.01, 0.99), st.integers(1, 8), st.booleans())
def test_ema_and_heavy_ball_agree_up_to_a_factor_while_the_momentum_is_constant(mu, steps, nesterov):
    ema, _ = directions("ema", [mu] * steps, nesterov)
    heavy, _ = directions("heavy_ball", [mu] * steps, nesterov)
    torch.testing.assert_close(ema, (1 - mu) * heavy, rtol=0, atol=1e-12)


def test_ema_and_heavy_ball_differ_under_a_momentum_schedule():
    """0.85 to 0.95 over 20 steps: the polar factors are no longer the same matrix."""
    momenta = [0.85 + 0.1 * t / 20 for t in range(20)]
    ema, heavy = (newton_schulz(directions(k, momenta, True)[0], "svd") for k in ("ema", "heavy_ball"))
    assert (ema - heavy).abs().max() > 0.02


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("kind", MOMENTUM_KINDS)
def test_gradients_are_not_written_to(kind, nesterov):
    state = {"momentum_buffer": torch.ones(3, 4, dtype=torch.float64)}
    grad = gradients(1)[0]
    before = grad.clone()
    MOMENTUM_KINDS[kind]([grad], [state], 0.9, nesterov)
    assert torch.equal(grad, before)
