"""A rule of somebody's own: one class and one registration, as the docstring of muonlab.optim.rules shows it."""

import inspect
import io
import textwrap
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import muonlab.optim.rules as rules
from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim import (
    AdamW,
    CombinedOptimizer,
    Muon,
    MuonClip,
    adamw_rule,
    build_optimizer,
    format_routing,
)
from muonlab.optim.muon_rule import MuonRuleSettings
from muonlab.optim.muon_stages import AFTER, one_each
from muonlab.optim.optimizers import OPTIMIZERS
from muonlab.optim.rules import RULES, Rule, register_rule
from muonlab.optim.weight_norms import WEIGHT_NORMS
from muonlab.optim.whole_model import optimizer_of_its_name
from muonlab.settings.check import Average, NonNegative
from muonlab.settings.optimizer import NAMES, AdamWGroup
from muonlab.train.config import read_section


@pytest.fixture
def heavy_ball():
    """Registers the rule of the docstring, word for word, and its optimizer."""
    lines = rules.__doc__.splitlines()
    code = "\n".join(line for line in lines if line.startswith("    ") or not line)
    names = {
        "dataclass": dataclass,
        "NonNegative": NonNegative,
        "Average": Average,
        "torch": torch,
        "Rule": Rule,
        "optimizer_of_its_name": optimizer_of_its_name,
    }
    exec(textwrap.dedent(code), {**names, "register_rule": register_rule, "__name__": "heavy_ball"})
    yield RULES["heavy_ball"]
    del RULES["heavy_ball"], OPTIMIZERS._builders["heavy_ball"], OPTIMIZERS._sections["heavy_ball"]


def plain_heavy_ball(W, gradients, lr, momentum, weight_decay):
    m = torch.zeros_like(W)
    for g in gradients:
        m = momentum * m + g
        W = W - lr * (m + weight_decay * W)
    return W


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)).double()


def train(optimizer, parameters, steps):
    for step in steps:
        for i, param in enumerate(parameters):
            generator = torch.Generator().manual_seed(10 * step + i)
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()


def test_a_custom_rule_works_beside_muon_in_one_optimizer(heavy_ball):
    net = model()
    table, linear, bias = (*net[0].parameters(), *net[1].parameters())
    before = table.detach().clone()
    groups = [
        {"params": [linear]},
        {"params": [bias], "rule": "adamw"},
        {"params": [table], "rule": "heavy_ball", "lr": 0.01, "weight_decay": 0.5},
    ]
    optimizer = Muon(groups)
    train(optimizer, [table], range(3))
    gradients = [
        torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * s), dtype=torch.float64)
        for s in range(3)
    ]
    expected = plain_heavy_ball(before, gradients, 0.01, 0.9, 0.5)
    torch.testing.assert_close(table.detach(), expected, rtol=0, atol=1e-14)
    assert [group["rule"] for group in optimizer.param_groups] == ["muon", "adamw", "heavy_ball"]


def test_a_whole_model_goes_under_it_and_resumes_to_the_bit(heavy_ball):
    runs = []
    for halves in ([range(4)], [range(2), range(2, 4)]):
        net, file = model(), io.BytesIO()
        for steps in halves:
            optimizer = build_optimizer("heavy_ball", net, lr=0.05)
            if steps.start:
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            train(optimizer, list(net.parameters()), steps)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
        runs.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert {route.rule for route in optimizer.routing} == {"heavy_ball"}
    assert "heavy_ball" in format_routing(optimizer.routing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, "lr of a heavy_ball group must be a finite number of at least 0, not -1"),
        (
            {"momentum": [0.9]},
            "momentum of a heavy_ball group must be a number of at least 0 and below 1",
        ),
        ({"betas": (0.9, 0.9)}, "unknown setting of a heavy_ball group 'betas'"),
    ],
)
def test_its_settings_are_checked_by_their_annotations(heavy_ball, settings, message):
    with pytest.raises(MuonlabError, match=message):
        AdamW([{"params": [nn.Parameter(torch.zeros(2))], "rule": "heavy_ball", **settings}])


def test_two_rules_cannot_have_the_same_name():
    with pytest.raises(MuonlabError, match="an update rule 'muon' is already registered"):
        register_rule("muon")(type("Other", (Rule,), {"settings": AdamWGroup}))


def test_the_signatures_name_every_setting_with_the_default_of_its_rule():
    """What `help(Muon)` shows is what a group may have."""
    muon = {name: p.default for name, p in inspect.signature(Muon).parameters.items()}
    adamw = {name: p.default for name, p in inspect.signature(AdamW).parameters.items()}
    of_groups = {name: muon.pop(f"adamw_{name}") for name in vars(AdamWGroup())}
    for shown, settings in ((muon, MuonRuleSettings()), (adamw, AdamWGroup()), (of_groups, AdamWGroup())):
        for outside in ("params", "clip", "quack", "averages"):
            shown.pop(outside, None)
        assert shown == vars(settings)


def test_muonclip_passes_every_setting_of_muon_on():
    """Its signature names those of the clip alone."""
    query, key = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    layout = AttentionLayout("attention", 2, 2, (HeadRows(query, 2),), (HeadRows(key, 2),))
    own = {
        "lr": 0.5,
        "ns_schedule": "polar_express",
        "nesterov": False,
        "row_blocks": 2,
        "after": ["normuon"],
        "beta2": 0.9,
    }
    with_clip = MuonClip([query, key], [layout], tau=7.0, adamw_lr=0.25, **own)
    alone = Muon([query, key], adamw_lr=0.25, **own)
    assert with_clip.param_groups == alone.param_groups
    assert with_clip._rule_defaults == alone._rule_defaults
    assert with_clip.clip.tau == 7.0
    with pytest.raises(TypeError, match="momentun"):
        MuonClip([query, key], [layout], momentun=0.9)


# ---------------------------------------------------------------- routes, stages, rules without a rate
def test_roles_go_under_any_registered_rule(heavy_ball):
    """As the rule that routes name, and as a rule that the other one leaves parameters to."""
    routed = build_optimizer("muon", model(), routes={"embedding": "heavy_ball"}).routing
    assert {route.name: route.rule for route in routed} == {
        "0.weight": "heavy_ball",
        "1.weight": "muon",
        "1.bias": "adamw",
    }


@pytest.fixture
def sphere():
    """A stage of one's own, which keeps the norm that a weight had before the step."""

    @WEIGHT_NORMS.register
    def sphere(s, before, after, kept):
        return before / after

    yield
    del WEIGHT_NORMS["sphere"]


def test_a_stage_of_ones_own_is_one_function_and_one_registration(sphere):
    W = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    before = W.detach().clone()
    train(Muon([W], lr=0.1, weight_norm="sphere"), [W], range(3))
    torch.testing.assert_close(W.norm(), before.norm())
    assert (W - before).norm() > 0.02 * before.norm()
    with pytest.raises(MuonlabError, match="did you mean 'sphere'"):
        Muon([W], weight_norm="spheer")
    with pytest.raises(MuonlabError, match="a weight_norm 'fixed' is already registered"):
        WEIGHT_NORMS.register(WEIGHT_NORMS["fixed"])


def test_a_chain_takes_stages_of_ones_own_with_what_they_keep():
    @AFTER.keeping(calls=one_each)
    def counted(s, O, D, G, kept):
        kept["calls"].add_(1)
        return O

    try:
        W = nn.Parameter(torch.ones(2, 6, 4))
        optimizer = Muon([W], after=["counted", "normuon"])
        train(optimizer, [W], range(3))
        assert optimizer.state[W]["calls_0"].tolist() == [[[3.0]], [[3.0]]]
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        del AFTER["counted"], AFTER.entries["counted"]


def test_the_names_that_need_no_torch_are_those_of_the_package():
    """Settings are checked before torch is imported, so these names are written down a second time."""
    tables = {table.setting: tuple(table) for table in RULES["muon"].stages}
    assert {**tables, "routes": NAMES["routes"]} == NAMES
    assert set(NAMES["routes"]) <= set(RULES)  # another one imports torch, and is then known


def test_a_config_may_name_a_stage_or_a_rule_of_ones_own(heavy_ball, sphere):
    settings = read_section(
        "optimizer", {"name": "muon", "weight_norm": "sphere", "routes": {"key": "heavy_ball"}}
    )
    assert (settings.weight_norm, settings.routes) == ("sphere", {"key": "heavy_ball"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"weight_decay_kind": "decopled"},
            "unknown optimizer.weight_decay_kind 'decopled'; did you mean 'deco",
        ),
        ({"after": ["normuom"]}, "unknown optimizer.after 'normuom'; did you mean 'normuon'"),
        ({"routes": {"key": "adam"}}, "unknown optimizer.routes 'adam'; did you mean 'adamw'"),
    ],
)
def test_a_config_that_names_an_unknown_one_is_refused(values, message):
    with pytest.raises(MuonlabError, match=message):
        read_section("optimizer", {"name": "muon", **values})


def test_a_rule_may_have_no_learning_rate():
    @register_rule("averaging")
    class Averaging(Rule):
        settings = dataclass(type("Settings", (), {"__annotations__": {"share": Average}, "share": 0.5}))

        def update(self, batch):
            s = batch.settings(self.settings)
            torch._foreach_lerp_(batch.params, batch.grads, s.share)

    try:
        W = nn.Parameter(torch.zeros(2))
        optimizer = CombinedOptimizer([W], "averaging")
        train(optimizer, [W], [0])
        torch.testing.assert_close(W.detach(), W.grad / 2)
        optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(MuonlabError, match="an averaging group has no learning rate that lr_scale could"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr_scale": 0.5})
    finally:
        del RULES["averaging"]


@pytest.mark.parametrize("settings", [{}, {"betas": (0.0, 0.999), "eps": 0.1, "weight_decay": 0.5}])
def test_the_stages_of_adamw_equal_its_kernel(settings, monkeypatch):
    runs = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(adamw_rule, "FUSED", ())
            monkeypatch.setattr(adamw_rule, "_fused", None)
        net = model()
        optimizer = AdamW(net.parameters(), lr=0.1, **settings)
        train(optimizer, list(net.parameters()), range(4))
        runs.append([p.detach() for p in net.parameters()])
        steps = [optimizer.state[p]["step"].item() for p in net.parameters()]
        assert steps == [4.0] * 3
    for kernel, stages in zip(*runs, strict=True):
        torch.testing.assert_close(stages, kernel, rtol=1e-6, atol=1e-6)
