"""What every registered optimizer owes every training loop."""

import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows, ParameterRole
from muonlab.optim import build_optimizer, list_optimizers, register_optimizer
from muonlab.optim.optimizers import OPTIMIZERS
from muonlab.optim.rules import RULES, setting_names

TAU = 2.0  # so low that a clip acts in the first steps
# What learns this task in 80 steps, where the default of an optimizer's source is for longer runs.
RATES = {"lion": 3e-3, "ademamix": 3e-3, "schedulefree_adamw": 0.02, "scion": 1e-3, "nadamw": 5e-3}


class Attention(nn.Module):
    """A causal attention layer over embedded tokens with a head, declaring all that an optimizer may know."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8, dtype=dtype)
        self.query, self.key, self.value, self.output = (
            nn.Linear(8, 8, bias=False, dtype=dtype) for _ in range(4)
        )
        self.norm = nn.RMSNorm(8, dtype=dtype)
        self.head = nn.Linear(8, 11, dtype=dtype)

    def parameter_roles(self):
        heads = {name: ParameterRole(name, 2) for name in ("query", "key", "value", "output")}
        one = {name: ParameterRole(name) for name in ("embedding", "norm", "head")}
        roles = {f"{name}.weight": role for name, role in (heads | one).items()}
        return roles | {"head.bias": ParameterRole("bias")}

    def attention_layouts(self):
        query, key = HeadRows(self.query.weight, 4), HeadRows(self.key.weight, 4)
        return [AttentionLayout("layer_00", 2, 2, (query,), (key,))]

    def forward(self, tokens):
        """(loss of predicting each token from those before it, max logits)."""
        x = self.embedding(tokens)
        q, k, v = (
            f(self.norm(x)).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        logits = (8 * q @ k.mT).masked_fill(~visible, -torch.inf)
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        predicted = self.head(x + self.output(mixed))[:, :-1]
        loss = nn.functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, logits.detach().amax((0, 2, 3)).float()[None]


def tokens(step=0):
    """Sequences in which each token, but for the first, follows from the one before it."""
    first = torch.randint(11, (4, 1), generator=torch.Generator().manual_seed(step))
    return (first * 2 ** torch.arange(9)) % 11


def build(name, model):
    rate = {"lr": RATES[name]} if name in RATES else {}
    return build_optimizer(name, model, **rate, **({"tau": TAU} if name.endswith("clip") else {}))


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss, max_logits = model(tokens(step))
        loss.backward()
        optimizer.observe(max_logits)
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(params=list_optimizers())
def name(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def test_the_four_corners_are_registered():
    assert {"adamw", "adamwclip", "muon", "muonclip"} <= set(list_optimizers())


def test_the_loss_falls(name, dtype):
    model = Attention(dtype)
    losses = train(model, build(name, model), 80)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_training_is_deterministic(name, dtype):
    models = Attention(dtype), Attention(dtype)
    losses = [train(model, build(name, model), 8) for model in models]
    assert losses[0] == losses[1]
    assert_same(*map(weights, models))


def test_the_state_round_trips_to_the_bit(name, dtype):
    straight, resumed = Attention(dtype), Attention(dtype)
    optimizer = build(name, straight)
    train(straight, optimizer, 4)
    file = io.BytesIO()
    torch.save((straight.state_dict(), optimizer.state_dict()), file)
    expected = train(straight, optimizer, 4, first=4)

    file.seek(0)
    model_state, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(model_state)
    other = build(name, resumed)
    other.load_state_dict(state)
    assert train(resumed, other, 4, first=4) == expected
    assert_same(weights(straight), weights(resumed))
    assert (other.gammas() is None) == (optimizer.gammas() is None)
    if optimizer.gammas() is not None:
        assert torch.equal(other.gammas(), optimizer.gammas())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_gradient_makes_a_nan(name, dtype, scale):
    model = Attention(dtype)
    optimizer = build(name, model)
    loss, max_logits = model(tokens())
    loss.backward()
    for _ in range(3):
        for param in model.parameters():
            param.grad = param.grad.sign() * scale
        optimizer.observe(max_logits)
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
    # An eps hides 1e-30, and the square of 1e30 is infinite in fp32: that does not move. Other rules have no scale.
    before, after = weights(Attention(dtype)), weights(model)
    for route in optimizer.routing:
        assert "eps" in setting_names(RULES[route.rule].settings) or not torch.equal(
            before[route.name], after[route.name]
        )


def test_learning_rate_zero_changes_nothing(name, dtype):
    model = Attention(dtype)
    optimizer = build_optimizer(name, model, **({"tau": 1e9} if name.endswith("clip") else {}))
    LambdaLR(optimizer, lambda _: 0.0)
    before = weights(model)
    train(model, optimizer, 3)
    assert_same(before, weights(model))


def test_a_clip_acts_and_only_a_clip(name):
    model = Attention(torch.float32)
    optimizer = build(name, model)
    train(model, optimizer, 1)
    gammas = optimizer.gammas()
    assert (gammas < 1).any() if name.endswith("clip") else gammas is None


def test_every_parameter_has_one_row_in_the_routing_table(name):
    model = Attention(torch.float32)
    routing = build(name, model).routing
    assert sorted(route.name for route in routing) == sorted(n for n, _ in model.named_parameters())
    assert all(route.reason for route in routing)


def test_settings_are_known_and_misspelt_ones_refused(name):
    model = Attention(torch.float32)
    assert {"lr", "weight_decay", "lr_scale"} <= set(OPTIMIZERS.settings(name))
    with pytest.raises(MuonlabError, match="unknown optimizer setting 'wieght_decay'; did you mean"):
        build_optimizer(name, model, wieght_decay=0.1)


def test_every_setting_can_be_given(name):
    """The defaults that the registry shows are taken when passed back, so none is shown and not taken."""
    model = Attention(torch.float32)
    optimizer = build_optimizer(name, model, **OPTIMIZERS.settings(name))
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
