"""Schedule-free AdamW against three sequences in fp64, and evaluation at the average."""

import io

import pytest
import torch
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.optim import AdamW, ScheduleFreeAdamW

STEPS = 6


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def three_sequences(W, grads, rates, b1, b2, eps, wd, r, power):
    """(x, y) after every step, with x and z kept apart and y between them."""
    x, z, v, total, largest, rows = W, W, 0 * W, 0.0, 0.0, []
    y = (1 - b1) * z + b1 * x
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        largest = max(largest, lr)
        total += t**r * largest**power
        c = t**r * largest**power / total
        v = b2 * v + (1 - b2) * g * g
        z = z - lr * (g / ((v / (1 - b2**t)).sqrt() + eps) + wd * y)
        x = (1 - c) * x + c * z
        y = (1 - b1) * z + b1 * x
        rows.append((x, y))
    return rows


@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        ({}, (0.9, 0.999, 1e-8, 0.0, 0.0, 2.0)),
        (
            {"betas": (0.6, 0.9), "eps": 0.1, "weight_decay": 0.3, "r": 1.0, "weight_lr_power": 1.0},
            (0.6, 0.9, 0.1, 0.3, 1.0, 1.0),
        ),
    ],
)
def test_training_is_at_y_and_evaluation_at_the_average(settings, oracle):
    """Over a warm-up and a decay, which change the weights of the average."""
    W, grads = draw(4, 3, seed=0), [draw(4, 3, seed=9 + i) for i in range(STEPS)]
    rates = [0.05, 0.1, 0.1, 0.1, 0.08, 0.02]
    param = nn.Parameter(W.clone())
    optimizer = ScheduleFreeAdamW([param], **settings)
    for g, lr, (x, y) in zip(grads, rates, three_sequences(W, grads, rates, *oracle), strict=True):
        optimizer.param_groups[0]["lr"], param.grad = lr, g
        optimizer.step()
        torch.testing.assert_close(param.detach(), y, rtol=0, atol=1e-7)  # counts and sums are fp32
        before = param.detach().clone()
        with optimizer.averaged():
            torch.testing.assert_close(param.detach(), x, rtol=0, atol=1e-7)
        assert torch.equal(param, before), "to the bit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_where_evaluation_fails_and_a_resumed_run_goes_on_to_the_bit(dtype):
    params = [nn.Parameter(draw(3, seed=i).to(dtype)) for i in range(2)]
    optimizer = ScheduleFreeAdamW(params, lr=0.1)

    def train(optimizer, params, first, last):
        for step in range(first, last):
            params[0].grad = draw(3, seed=50 + step).to(dtype)
            optimizer.step()

    train(optimizer, params, 0, 3)
    before = [p.detach().clone() for p in params]

    def evaluation_that_fails():
        with optimizer.averaged():
            assert not torch.equal(params[0], before[0])
            assert torch.equal(params[1], before[1]), "never updated: evaluated where it is"
            raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        evaluation_that_fails()
    assert all(map(torch.equal, params, before))

    file = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.detach() for p in params]), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    others = [nn.Parameter(w) for w in weights]
    other = ScheduleFreeAdamW(others)
    other.load_state_dict(state)
    train(optimizer, params, 3, 5)
    train(other, others, 3, 5)
    assert all(map(torch.equal, params, others))
    with optimizer.averaged():
        expected = params[0].detach().clone()
    with other.averaged():
        assert torch.equal(others[0], expected)


def test_other_rules_are_evaluated_at_their_weights():
    param = nn.Parameter(torch.ones(2))
    optimizer = AdamW([param])
    param.grad = torch.ones(2)
    optimizer.step()
    before = param.detach().clone()
    with optimizer.averaged():
        assert torch.equal(param, before)


def test_a_first_beta_of_0_has_no_average_to_read():
    with pytest.raises(MuonlabError, match="betas of a schedulefree_adamw group"):
        ScheduleFreeAdamW([nn.Parameter(torch.ones(2))], betas=(0.0, 0.9))
