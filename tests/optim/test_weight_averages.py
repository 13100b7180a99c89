"""EMA-Nesterov and the tail average against their equations in fp64, around several rules."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.errors import MuonlabError
from muonlab.optim import AdamW, CombinedOptimizer, Muon, WeightAverages, build_optimizer, list_optimizers
from muonlab.optim.specimen import Specimen
from muonlab.settings.optimizer import AverageSettings

STEPS = 8
BASES = {
    "adamw": lambda params, averages: AdamW(params, 0.03, weight_decay=0.1, averages=averages),
    "muon": lambda params, averages: Muon(params, 0.03, weight_decay=0.1, averages=averages),
}


def start() -> torch.Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradient(W: torch.Tensor, step: int) -> torch.Tensor:
    """Of a quadratic with noise of the step's own."""
    noise = torch.randn(W.shape, dtype=W.dtype, generator=torch.Generator().manual_seed(100 + step))
    return W - 1 + 0.3 * noise


def train(base, averages, rates, W=None):
    """The weights in training and those that evaluation reads, after every step."""
    W = torch.nn.Parameter(start() if W is None else W)
    optimizer = BASES[base]([W], averages)
    path = []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = 0.03 * rate
        W.grad = gradient(W.detach(), step).to(W.dtype)
        optimizer.step()
        with optimizer.averaged():
            path.append((None, W.detach().clone()))
        path[-1] = (W.detach().clone(), path[-1][1])
    return path, optimizer


def expected(base, s, rates):
    """The same from the papers' equations, around an optimizer without averages, whose parameter is set by hand."""
    x, m, e, beta = start(), torch.zeros(6, 4, dtype=torch.float64), None, 0.0
    W = torch.nn.Parameter(x.clone())
    optimizer = BASES[base]([W], None)
    path = []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = 0.03 * rate
        y = x + beta * m
        W.data.copy_(y)
        W.grad = gradient(y, step)
        optimizer.step()  # x_{t+1} = A(y_t)
        moved = W.detach().clone()
        m = s.lookahead_memory * m + (1 - s.lookahead_memory) * (moved - x)
        x = moved
        ahead = s.lookahead_from <= step + 1 < (s.lookahead_until or 10**9)
        beta = s.lookahead * rate * ahead
        if s.tail_share and step >= s.tail_from:
            e = x if e is None else e + (x - e) / s.tail_horizon
        read = x if e is None else (1 - s.tail_share) * x + s.tail_share * e
        path.append((x + beta * m, read))
    return path


@pytest.mark.parametrize("base", BASES)
@settings(max_examples=15, deadline=None)
@given(
    lookahead=st.sampled_from([0.0, 0.3, 2.0]),
    memory=st.sampled_from([0.0, 0.5, 0.99]),
    first=st.integers(0, 4),
    until=st.none() | st.integers(1, STEPS),
    share=st.sampled_from([0.0, 0.6, 1.0]),
    horizon=st.integers(1, 5),
    begin=st.integers(0, STEPS),
)
def test_both_averages_follow_their_equations(base, lookahead, memory, first, until, share, horizon, begin):
    s = AverageSettings(
        lookahead=lookahead,
        lookahead_memory=memory,
        lookahead_from=first,
        lookahead_until=until,
        tail_share=share,
        tail_horizon=horizon,
        tail_from=begin,
    )
    rates = [0.2, 0.6, 1.0, 1.0, 1.0, 0.5, 0.25, 0.0]
    path, _ = train(base, WeightAverages(s), rates)
    for here, there in zip(path, expected(base, s, rates), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


def test_without_averages_nothing_is_kept_and_settings_of_none_are_no_average():
    path, optimizer = train("muon", None, [1.0] * 3)
    assert all(torch.equal(weights, read) for weights, read in path)
    assert WeightAverages.of(AverageSettings()) is None
    assert not {"lookahead_average", "tail_average"} & set(next(iter(optimizer.state.values())))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_from_its_state_to_the_bit(base, dtype):
    averages = WeightAverages(
        AverageSettings(lookahead=0.5, lookahead_memory=0.5, tail_share=0.6, tail_from=2)
    )
    whole, _ = train(base, averages, [1.0] * STEPS, start().to(dtype))
    half, optimizer = train(base, averages, [1.0] * 4, start().to(dtype))
    W = torch.nn.Parameter(half[-1][0].clone())
    other = BASES[base]([W], averages)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(4, STEPS):
        W.grad = gradient(W.detach(), step).to(dtype)
        other.step()
        with other.averaged():
            assert torch.equal(W, whole[step][1])
        assert torch.equal(W, whole[step][0])


def test_a_state_that_was_ahead_goes_on_where_nothing_looks_ahead_any_more():
    path, optimizer = train("adamw", WeightAverages(AverageSettings(lookahead=2.0)), [1.0] * 3)
    W = torch.nn.Parameter(path[-1][0].clone())
    other = BASES["adamw"]([W], WeightAverages(AverageSettings(tail_share=1.0, tail_horizon=1)))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    W.grad = gradient(W.detach(), 3)
    other.step()
    with other.averaged():
        read = W.detach().clone()
    assert torch.equal(read, W)


def test_a_damaged_average_is_refused_before_anything_changes():
    averages = WeightAverages(AverageSettings(lookahead=0.5))
    path, optimizer = train("adamw", averages, [1.0] * 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["lookahead_average"] = torch.zeros(2, 2)
    with pytest.raises(MuonlabError, match="lookahead_average of"):
        optimizer.load_state_dict(state)
    assert torch.equal(optimizer.param_groups[0]["params"][0], path[-1][0])


def test_every_optimizer_by_name_takes_them_but_the_one_that_is_an_average():
    model = Specimen()
    for name in set(list_optimizers()) - {"schedulefree_adamw"}:
        optimizer = build_optimizer(name, model, lookahead=0.3, tail_share=0.6)
        assert optimizer.averages is not None, name
        assert (optimizer.averages.settings.lookahead, optimizer.averages.settings.tail_share) == (0.3, 0.6)
    with pytest.raises(MuonlabError, match="schedulefree_adamw is an average of the weights itself"):
        build_optimizer("schedulefree_adamw", model, lookahead=0.3)
    with pytest.raises(MuonlabError, match="schedulefree_adamw is an average"):
        CombinedOptimizer(
            [{"params": [torch.nn.Parameter(start())], "rule": "schedulefree_adamw"}],
            "adamw",
            averages=WeightAverages(AverageSettings(tail_share=1.0)),
        )
