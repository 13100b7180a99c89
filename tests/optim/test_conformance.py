"""Every registered optimizer keeps the checks of muonlab.optim.conformance, and the checks find what is wrong."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.optim import (
    CombinedOptimizer,
    Rule,
    build_optimizer,
    list_optimizers,
    register_optimizer,
    register_rule,
)
from muonlab.optim.check import fault_of, find_optimizer
from muonlab.optim.conformance import Subject, changed
from muonlab.optim.optimizers import OPTIMIZERS
from muonlab.optim.routing import parameter_groups
from muonlab.optim.rules import RULES, setting_names
from muonlab.optim.specimen import Specimen, backward, train, weights
from muonlab.optim.torch_contract import CHECKS
from muonlab.settings.check import NonNegative


@pytest.fixture(params=list_optimizers())
def name(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("title", CHECKS)
def test_a_check_holds(title, name, dtype):
    CHECKS[title](Subject(name), dtype)


def test_the_four_corners_are_registered():
    assert {"adamw", "adamwclip", "muon", "muonclip"} <= set(list_optimizers())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_what_has_no_eps_moves_by_gradients_of_any_size(name, scale):
    """An eps hides 1e-30, and the square of 1e30 is infinite in fp32: that does not move. Other rules have no scale."""
    model = Specimen()
    optimizer = Subject(name).build(model)
    before = weights(model)
    for _ in range(3):
        backward(model, optimizer)
        for param in model.parameters():
            param.grad = param.grad.sign() * scale
        optimizer.step()
    moved = changed(before, weights(model))
    for route in optimizer.routing:
        assert "eps" in setting_names(RULES[route.rule].settings) or route.name in moved, route


def test_a_clip_acts_and_only_a_clip(name):
    model, subject = Specimen(), Subject(name)
    optimizer = subject.build(model)
    train(model, optimizer, 1)
    gammas = optimizer.gammas()
    assert (gammas < 1).any() if subject.clips else gammas is None


def test_settings_are_known_and_misspelt_ones_refused(name):
    assert {"lr", "weight_decay", "lr_scale"} <= set(OPTIMIZERS.settings(name))
    with pytest.raises(MuonlabError, match="unknown optimizer setting 'wieght_decay'; did you mean"):
        build_optimizer(name, Specimen(), wieght_decay=0.1)


def test_every_setting_can_be_given(name):
    """The defaults that the registry shows are taken when passed back, so none is shown and not taken."""
    optimizer = build_optimizer(name, Specimen(), **OPTIMIZERS.settings(name))
    assert max(group["lr"] for group in optimizer.param_groups) >= OPTIMIZERS.settings(name)["lr"]


def test_clips_take_the_settings_of_what_they_are_added_to_and_of_the_clip():
    for base in ("adamw", "muon"):
        extra = set(OPTIMIZERS.settings(f"{base}clip")) - set(OPTIMIZERS.settings(base))
        soft = {"clip_momentum", "clip_power", "clip_average"}
        assert extra == {"tau", "alpha", "maximum", "per", "windows", *soft}


def test_a_clip_needs_declared_layouts():
    with pytest.raises(MuonlabError, match=r"Linear declares no attention_layouts\(\)"):
        build_optimizer("muonclip", nn.Linear(3, 3))


def test_a_misspelt_optimizer_is_refused_with_the_near_names():
    with pytest.raises(MuonlabError, match="unknown optimizer 'moun'; did you mean 'muon'"):
        build_optimizer("moun", nn.Linear(3, 3))


def test_a_registered_name_is_taken():
    with pytest.raises(MuonlabError, match="optimizer 'muon' is already registered"):
        register_optimizer("muon")(lambda model: None)


# ---------------------------------------------------------------------- a check finds what is wrong
@dataclass(frozen=True, kw_only=True)
class Plain:
    """The settings of the broken rules below."""

    lr: NonNegative = 0.1


def descend(batch, rate=None):
    rate = batch.settings(Plain).lr if rate is None else rate
    torch._foreach_add_(batch.params, batch.grads, alpha=-rate)


class Climbing(Rule):
    def update(self, batch):
        descend(batch, -batch.settings(Plain).lr)


class Unscheduled(Rule):
    def update(self, batch):
        descend(batch, 0.1)


class Random(Rule):
    def update(self, batch):
        descend(batch, float(torch.rand(())))


class Overflowing(Rule):
    def update(self, batch):
        torch._foreach_add_(batch.params, [g * g.square().mean() for g in batch.grads], alpha=-1.0)


class Amnesic(Rule):
    """It counts its steps outside of the state."""

    steps = itertools.count(1)

    def update(self, batch):
        descend(batch, 1 / next(self.steps))


class EagerOnly(Rule):
    def update(self, batch):
        descend(batch, 0.0 if torch.compiler.is_compiling() else None)


class NumbersOnly(Rule):
    def update(self, batch):
        rate = batch.settings(Plain).lr
        descend(batch, 0.1 if isinstance(rate, torch.Tensor) else 2 * rate)


class Faulty(Rule):
    def update(self, batch):
        raise ValueError("not\nyet")


class Forgetful(CombinedOptimizer):
    def step(self, closure=None):
        super().step(closure)

    def state_dict(self):
        state = super().state_dict()
        return state | {"param_groups": [group | {"lr": 0.3} for group in state["param_groups"]]}


@pytest.mark.parametrize(
    ("rule", "cls", "title", "said"),
    [
        (Climbing, CombinedOptimizer, "the loss falls", "after 80 steps the loss is"),
        (Unscheduled, CombinedOptimizer, "learning rate 0", "it moves at a learning rate of 0: "),
        (Random, CombinedOptimizer, "training is deterministic", "training twice gives other weights"),
        (Overflowing, CombinedOptimizer, "gradients of 1e30", "became infinite or NaN"),
        (Amnesic, CombinedOptimizer, "resumed training is equal to the bit", "resumed training gives other weights"),
        (Amnesic, CombinedOptimizer, "deepcopy", "a deep copy trains on differently"),
        (Amnesic, CombinedOptimizer, "pickle", "an unpickled copy trains on differently"),
        (EagerOnly, CombinedOptimizer, "compiled steps", "a compiled step gives other weights than step(): "),
        (NumbersOnly, CombinedOptimizer, "learning rate as a tensor", "as a tensor gives other weights: "),
        (Faulty, CombinedOptimizer, "hooks of a step", "ValueError: not yet"),
        (Climbing, Forgetful, "closures", "step(closure) returns None and not the closure's loss"),
        (Climbing, Forgetful, "state round trip to the bit", "param_groups[0]['lr'] is not what was saved"),
        (Climbing, lambda *_: torch.optim.SGD([torch.zeros(1)]), "closures", "returns a SGD and no CombinedOptimizer"),
    ],
)  # fmt: skip
def test_a_check_finds_its_fault(rule, cls, title, said, monkeypatch):
    monkeypatch.setattr(rule, "settings", Plain, raising=False)
    monkeypatch.setitem(RULES, "broken", rule())
    monkeypatch.setattr(rule, "name", "broken", raising=False)
    monkeypatch.setattr(OPTIMIZERS, "_builders", dict(OPTIMIZERS._builders))
    monkeypatch.setattr(OPTIMIZERS, "_sections", dict(OPTIMIZERS._sections))

    @register_optimizer("broken")
    def broken(model, *, lr: NonNegative = 0.1):
        return cls(parameter_groups(model, "broken"), "broken", {"broken": Plain(lr=lr)})

    assert said in fault_of(title, Subject("broken"), "fp32")


def test_a_rule_that_is_whole_has_no_fault(monkeypatch):
    """The plain descent from which the broken ones differ."""
    monkeypatch.setattr(OPTIMIZERS, "_builders", dict(OPTIMIZERS._builders))
    monkeypatch.setattr(OPTIMIZERS, "_sections", dict(OPTIMIZERS._sections))
    monkeypatch.setattr("muonlab.optim.rules.RULES", RULES)
    try:

        @register_rule("descent")
        class Descent(Rule):
            settings = Plain

            def update(self, batch):
                descend(batch)

        @register_optimizer("descent")
        def descent(model, *, lr: NonNegative = 0.1):
            return CombinedOptimizer(parameter_groups(model, "descent"), "descent", {"descent": Plain(lr=lr)})

        found = {title: fault_of(title, Subject("descent"), "fp32") for title in CHECKS}
    finally:
        RULES.pop("descent", None)
    # A step of 1e29 on a loss of order 1 leaves fp32's range in the next forward, not in the weights.
    assert {title: fault for title, fault in found.items() if fault} == {}


def test_an_optimizer_that_is_not_there_is_one_sentence():
    assert find_optimizer("muon") == "muon"
    with pytest.raises(MuonlabError, match="unknown optimizer 'moun'"):
        find_optimizer("moun")
