"""What one update takes away from a weight, for every kind of decay and its coupling to the learning rate."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from muonlab.optim import Muon

SHAPE = (8, 2)
SCALE = 2.0  # of `original` for this shape


def update(weight, lr, multiplier=1.0, **settings):
    """(weight after one step with decay, weight after the same step without)."""
    results = []
    for given in (settings, {}):
        param = torch.nn.Parameter(weight.clone())
        optimizer = Muon([param], lr=lr, scale_rule="original", **given)
        LambdaLR(optimizer, lambda _: multiplier)
        param.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        optimizer.step()
        results.append(param.detach())
    return results


@pytest.fixture
def weight():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "share"),
    [("decoupled", 0.02 * 0.5 * 0.3), ("independent", 0.5 * 0.3), ("shape_scaled", 0.02 * 0.5 * SCALE * 0.3)],
)
def test_the_share_of_every_kind_at_half_the_peak_learning_rate(weight, kind, share):
    with_decay, without = update(weight, 0.02, 0.5, weight_decay=0.3, weight_decay_kind=kind)
    torch.testing.assert_close(with_decay, without - share * weight, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["decoupled", "independent", "shape_scaled"])
def test_cautious_decays_only_entries_that_the_update_pulls_the_same_way(weight, kind):
    with_decay, without = update(weight, 0.02, weight_decay=0.3, weight_decay_kind=kind)
    cautious, _ = update(weight, 0.02, weight_decay=0.3, weight_decay_kind=kind, cautious=True)
    direction = weight - without
    same = weight * direction >= 0
    assert 0 < same.sum() < same.numel()
    assert torch.equal(cautious[~same], without[~same])
    torch.testing.assert_close(cautious[same], with_decay[same], rtol=0, atol=1e-15)


def test_independent_decay_does_not_follow_the_tuned_learning_rate(weight):
    lost = []
    for lr in (0.02, 0.001):
        with_decay, without = update(weight, lr, weight_decay=0.1, weight_decay_kind="independent")
        lost.append(without - with_decay)
    torch.testing.assert_close(lost[0], lost[1], rtol=0, atol=1e-15)
    torch.testing.assert_close(lost[0], 0.1 * weight, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["decoupled", "independent", "shape_scaled"])
@pytest.mark.parametrize("peak", [0.02, 0.0])
def test_no_kind_decays_at_learning_rate_zero(weight, kind, peak):
    with_decay, _ = update(weight, peak, 0.0, weight_decay=0.3, weight_decay_kind=kind)
    assert torch.equal(with_decay, weight)
