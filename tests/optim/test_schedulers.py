"""Every scheduler of torch over every optimizer, with groups of both rules."""

import copy
import inspect
import io
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import CyclicLR, LinearLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import SWALR

from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim import AdamW, Muon, MuonClip

STEPS = 6

SCHEDULERS = {
    "LambdaLR": lambda o: torch_schedulers.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: torch_schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: StepLR(o, 2),
    "MultiStepLR": lambda o: torch_schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: torch_schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: torch_schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: torch_schedulers.SequentialLR(o, [LinearLR(o, 0.1), StepLR(o, 1)], [2]),
    "PolynomialLR": lambda o: torch_schedulers.PolynomialLR(o, STEPS),
    "CosineAnnealingLR": lambda o: torch_schedulers.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": lambda o: torch_schedulers.ChainedScheduler([LinearLR(o, 0.1), StepLR(o, 1)]),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: CyclicLR(o, 0.001, 0.1, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "SWALR": lambda o: SWALR(o, 0.05, 2),
}
MOMENTUM_CYCLES = ("CyclicLR", "OneCycleLR")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters():
    return [nn.Parameter(draw(4, 4, seed=i)) for i in range(3)]


def groups(params):
    return [{"params": params[:2]}, {"params": params[2:], "rule": "adamw", "name": "gains"}]


def layouts(params):
    return [AttentionLayout("layer", 2, 2, (HeadRows(params[0], 2),), (HeadRows(params[1], 2),))]


OPTIMIZERS = {
    "muon": lambda p: Muon(p),
    "muon with adamw groups": lambda p: Muon(groups(p)),
    "muon with adamw groups alone": lambda p: Muon([{"params": p, "rule": "adamw"}]),
    "muonclip": lambda p: MuonClip(groups(p), layouts(p), tau=10.0),
    "adamw": lambda p: AdamW(p),
    "adamw of two groups": lambda p: AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.1}]),
}


def train(optimizer, scheduler, steps, first=0):
    """The rates and the momenta of every step, a row a group."""
    rows = []
    for step in range(first, first + steps):
        rows.append([(g["lr"], momentum(g)) for g in optimizer.param_groups])
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = draw(4, 4, seed=100 + step)
        optimizer.observe(torch.tensor([5.0, 40.0])[None])
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    return rows


def momentum(group):
    return group["momentum"] if "momentum" in group else group["betas"][0]


def test_none_of_torchs_schedulers_is_left_out():
    theirs = {
        name
        for name, kind in inspect.getmembers(torch_schedulers, inspect.isclass)
        if issubclass(kind, LRScheduler) and not name.startswith("_") and kind is not LRScheduler
    }
    assert theirs <= set(SCHEDULERS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_moves_rates_and_momenta_and_a_resumed_run_continues_to_the_bit(scheduler, optimizer):
    straight = parameters()
    whole = OPTIMIZERS[optimizer](straight)
    schedule = SCHEDULERS[scheduler](whole)
    rows = train(whole, schedule, STEPS // 2)
    file = io.BytesIO()
    torch.save((whole.state_dict(), schedule.state_dict(), straight), file)
    expected = train(whole, schedule, STEPS - STEPS // 2, first=STEPS // 2)
    assert len({tuple(row) for row in (*rows, *expected)}) > 1
    assert all(param.isfinite().all() for param in straight)

    file.seek(0)
    state, scheduled, weights = torch.load(file, weights_only=False)
    other = OPTIMIZERS[optimizer](weights)
    resumed = SCHEDULERS[scheduler](other)
    other.load_state_dict(state)
    resumed.load_state_dict(scheduled)
    assert train(other, resumed, STEPS - STEPS // 2, first=STEPS // 2) == expected
    assert all(torch.equal(a, b) for a, b in zip(straight, weights, strict=True))
    assert other.state_dict()["param_groups"] == whole.state_dict()["param_groups"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", MOMENTUM_CYCLES)
def test_a_cycled_momentum_is_the_first_beta_of_adamw_groups(scheduler, optimizer):
    """The updates are those of an optimizer whose momenta and betas are set by hand."""
    cycled, set_by_hand = parameters(), parameters()
    optimizers = OPTIMIZERS[optimizer](cycled), OPTIMIZERS[optimizer](set_by_hand)
    schedule = SCHEDULERS[scheduler](optimizers[0])
    still = StepLR(optimizers[1], 1000)
    used = set()
    for step in range(STEPS):
        for ours, theirs in zip(*(o.param_groups for o in optimizers), strict=True):
            used.add(momentum(ours))
            theirs["lr"] = ours["lr"]
            if theirs["rule"] == "muon":
                theirs["momentum"] = momentum(ours)
            else:
                theirs["betas"] = (momentum(ours), theirs["betas"][1])
        train(optimizers[0], schedule, 1, first=step)
        train(optimizers[1], still, 1, first=step)
    assert len(used) >= 3
    assert all(torch.equal(a, b) for a, b in zip(cycled, set_by_hand, strict=True))


@pytest.mark.parametrize("scheduler", MOMENTUM_CYCLES)
def test_momenta_and_rates_may_be_cycled_per_group(scheduler):
    optimizer = Muon(groups(parameters()))
    if scheduler == "OneCycleLR":
        OneCycleLR(optimizer, [0.1, 0.01], total_steps=9, max_momentum=[0.95, 0.9], base_momentum=[0.85, 0.8])
    else:
        CyclicLR(optimizer, [0.001, 0.01], [0.1, 0.02], max_momentum=[0.95, 0.9], base_momentum=[0.85, 0.8])
    assert [momentum(group) for group in optimizer.param_groups] == [0.95, 0.9]
    assert [group["max_lr"] for group in optimizer.param_groups if "max_lr" in group] in ([], [0.1, 0.01])
    before = optimizer.param_groups[1]["lr"]
    train(optimizer, StepLR(optimizer, 1000), 2)
    assert optimizer.param_groups[1]["lr"] == before


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_optimizer_made_from_a_scheduled_one_has_its_groups(scheduler):
    optimizer = Muon(groups(parameters()))
    schedule = SCHEDULERS[scheduler](optimizer)
    train(optimizer, schedule, 2)
    other = Muon(copy.deepcopy(optimizer.param_groups))
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize(
    ("optimizer", "absent"),
    [
        (Muon([draw(4, 4)], lr=0.3, momentum=0.7), "betas"),
        (AdamW([draw(4)], lr=0.3, betas=(0.7, 0.8)), "momentum"),
    ],
)
def test_defaults_say_what_groups_are_given(optimizer, absent):
    """As torch's optimizers do, also for a group that is added later, and of no other rule's settings."""
    assert absent not in optimizer.defaults
    optimizer.add_param_group({"params": [draw(4, 4)]})
    for group in optimizer.param_groups:
        assert optimizer.defaults.items() <= group.items()
    assert optimizer.defaults["lr"] == 0.3
    assert momentum(optimizer.defaults) == 0.7


def test_a_group_has_the_settings_of_its_own_rule_alone():
    """torch gives every group the defaults; momentum and scale rule mean nothing in an adamw group."""
    optimizer = Muon(groups(parameters()))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [draw(4)], "rule": "adamw"})
    expected = {"params", "name", "rule", "lr", "betas", "eps", "weight_decay", "peak_lr"}
    assert set(optimizer.param_groups[1]) == set(optimizer.param_groups[2]) == expected
    assert math.isclose(optimizer.param_groups[2]["lr"], 3e-3)
