"""Lion, Signum, AdEMAMix and NAdamW against their papers' equations in fp64, and torch's contract for each."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from muonlab.errors import MuonlabError
from muonlab.optim import (
    SOAP,
    AdEMAMix,
    KLShampoo,
    Lion,
    Muon,
    NAdamW,
    ScheduleFreeAdamW,
    Scion,
    Shampoo,
    Signum,
    SOAPMuon,
    build_optimizer,
)
from muonlab.optim.rules import RULES

STEPS = 7
ALONE = {
    "lion": Lion,
    "signum": Signum,
    "ademamix": AdEMAMix,
    "nadamw": NAdamW,
    "schedulefree_adamw": ScheduleFreeAdamW,
    "scion": Scion,
    "soap": SOAP,
    "soap_muon": SOAPMuon,
    "shampoo": Shampoo,
    "kl_shampoo": KLShampoo,
}


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(*shape):
    return [draw(*shape, seed=100 + i) for i in range(STEPS)]


def trained(make, W, grads):
    param = nn.Parameter(W.clone())
    optimizer = make([param])
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        assert torch.equal(param.grad, grad), "gradients are not written to"
    return param.detach()


def lion(W, grads, lr, b1, b2, wd):
    m = 0 * W
    for g in grads:
        c = b1 * m + (1 - b1) * g
        W = W - lr * (torch.sign(c) + wd * W)
        m = b2 * m + (1 - b2) * g
    return W


def signum(W, grads, lr, mu, wd):
    m = 0 * W
    for g in grads:
        m = mu * m + (1 - mu) * g
        W = W - lr * (torch.sign(m) + wd * W)
    return W


def ademamix(W, grads, lr, b1, b2, b3, alpha, T_alpha, T_b3, eps, wd):
    m1, m2, v = 0 * W, 0 * W, 0 * W
    for t, g in enumerate(grads, 1):
        a = min(t * alpha / T_alpha, alpha) if T_alpha else alpha
        b = b3
        if T_b3:  # the schedule of the paper, section 3.1
            share = t / T_b3
            ln1, ln3 = math.log(b1), math.log(b3)
            b = min(math.exp(ln1 * ln3 / ((1 - share) * ln3 + share * ln1)), b3) if share < 1 else b3
        m1, m2 = b1 * m1 + (1 - b1) * g, b * m2 + (1 - b) * g
        v = b2 * v + (1 - b2) * g * g
        m_hat, v_hat = m1 / (1 - b1**t), v / (1 - b2**t)
        W = W - lr * ((m_hat + a * m2) / (v_hat.sqrt() + eps) + wd * W)
    return W


@pytest.mark.parametrize(
    ("make", "oracle"),
    [
        (lambda p: Lion(p, 0.01), lambda W, g: lion(W, g, 0.01, 0.9, 0.99, 0.0)),
        (
            lambda p: Lion(p, 0.1, betas=(0.0, 0.5), weight_decay=0.3),
            lambda W, g: lion(W, g, 0.1, 0, 0.5, 0.3),
        ),
        (lambda p: Signum(p), lambda W, g: signum(W, g, 0.01, 0.9, 0.0)),
        (
            lambda p: Signum(p, 0.1, momentum=0.0, weight_decay=0.3),
            lambda W, g: signum(W, g, 0.1, 0.0, 0.3),
        ),
        (
            lambda p: AdEMAMix(p),
            lambda W, g: ademamix(W, g, 1e-3, 0.9, 0.999, 0.9999, 2.0, None, None, 1e-8, 0.0),
        ),
        (
            lambda p: AdEMAMix(
                p,
                0.1,
                betas=(0.8, 0.9, 0.99),
                alpha=5.0,
                alpha_warmup=5,
                beta3_warmup=5,
                eps=0.1,
                weight_decay=0.2,
            ),
            lambda W, g: ademamix(W, g, 0.1, 0.8, 0.9, 0.99, 5.0, 5, 5, 0.1, 0.2),
        ),
    ],
)
def test_updates_are_those_of_the_paper(make, oracle):
    W, grads = draw(4, 3, seed=0), gradients(4, 3)
    torch.testing.assert_close(trained(make, W, grads), oracle(W, grads), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("settings", [{}, {"betas": (0.5, 0.9), "momentum_decay": 0.3, "weight_decay": 0.2}])
def test_nadamw_is_torchs(settings):
    W, grads = draw(4, 3, seed=0), gradients(4, 3)
    torchs = trained(
        lambda p: torch.optim.NAdam(p, lr=0.1, decoupled_weight_decay=True, **settings), W, grads
    )
    torch.testing.assert_close(
        trained(lambda p: NAdamW(p, 0.1, **settings), W, grads), torchs, rtol=1e-6, atol=1e-7
    )


def test_ademamix_without_the_slow_average_is_adamw():
    W, grads = draw(4, 3, seed=0), gradients(4, 3)
    adamw = trained(lambda p: torch.optim.AdamW(p, 1e-3, (0.9, 0.999), weight_decay=0.0), W, grads)
    torch.testing.assert_close(trained(lambda p: AdEMAMix(p, alpha=0.0), W, grads), adamw, rtol=1e-12, atol=0)


def test_a_slow_beta_that_warms_up_from_0_begins_with_the_gradient():
    """ln 0 is no number; b1 = 0 is allowed."""
    W = draw(3, seed=0)
    make = lambda p: AdEMAMix(p, betas=(0.0, 0.9, 0.99), beta3_warmup=4)  # noqa: E731
    assert trained(make, W, gradients(3)).isfinite().all()


# ---------------------------------------------------------------- torch's contract, for each by name
@pytest.fixture(params=ALONE)
def name(request):
    return request.param


def test_the_class_names_every_setting_with_the_default_of_its_rule(name):
    shown = {key: p.default for key, p in inspect.signature(ALONE[name]).parameters.items()}
    for outside in ("params", "clip"):
        shown.pop(outside, None)
    settings = vars(RULES[name].settings())
    assert shown == {key: settings[key] for key in shown}
    assert settings.keys() - shown.keys() <= {"row_blocks", "col_blocks", "flatten"}


def test_it_stands_beside_muon_by_a_route(name):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8))
    rules = {r.name: r.rule for r in build_optimizer("muon", model, routes={"2.weight": name}).routing}
    assert rules == {
        "0.weight": "adamw",
        "1.weight": "muon",
        "1.bias": "adamw",
        "2.weight": name,
        "2.bias": "adamw",
    }


def parameters():
    return [nn.Parameter(draw(4, 4, seed=i).float()) for i in range(3)]


def steps(optimizer, params, first, last, rate=None):
    for step in range(first, last):
        for i, param in enumerate(params):
            param.grad = draw(4, 4, seed=10 * step + i).float()
        optimizer.step()
        if rate is not None:
            rate.step()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_like_the_original(name, copied):
    params = parameters()
    optimizer = ALONE[name](params)
    steps(optimizer, params, 0, 3)
    others, other = copied((params, optimizer))
    steps(optimizer, params, 3, 5)
    steps(other, others, 3, 5)
    assert same(params, others)


def test_groups_added_later_frozen_and_absent_gradients(name):
    first, frozen, late = parameters()
    frozen.requires_grad_(False)
    optimizer = ALONE[name]([first, frozen])
    before = frozen.clone()
    steps(optimizer, [first], 0, 2)
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    steps(optimizer, [first, late], 2, 3)
    alone = parameters()[2]
    other = ALONE[name]([alone], lr=0.5)
    alone.grad = late.grad
    other.step()
    assert torch.equal(frozen, before)
    assert torch.equal(late, alone), "steps are counted for each parameter"


def test_a_closure_and_hooks_are_run(name):
    (param, *_), seen = parameters(), []
    optimizer = ALONE[name]([param])
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        seen.append("closure")
        return loss

    before = param.detach().clone()
    loss = optimizer.step(closure)
    assert seen == ["before", "closure", "after"]
    assert loss == before.square().sum()
    optimizer.step(closure)  # SOAP does not move before the second
    assert not torch.equal(param, before)


@pytest.mark.parametrize("scheduler", [OneCycleLR, CyclicLR])
def test_momentum_cycles_reach_it_beside_muon(name, scheduler):
    """The schedulers write `momentum` into every group."""
    params = parameters()
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:], "rule": name}])
    rate = OneCycleLR(optimizer, 0.1, 9) if scheduler is OneCycleLR else CyclicLR(optimizer, 0.001, 0.1, 2)
    steps(optimizer, params, 0, 4, rate)
    assert optimizer.param_groups[0]["momentum"] == optimizer.param_groups[1]["momentum"]
    still = parameters()
    other = Muon([{"params": still[:1]}, {"params": still[1:], "rule": name}])
    for step in range(4):
        for group, rates in zip(other.param_groups, cycle(scheduler), strict=True):
            group["lr"], momentum = rates[step]
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum
        steps(other, still, step, step + 1)
    assert same(params, still)


def cycle(scheduler):
    """(rate, momentum) of every step, for two groups."""
    muon = Muon([{"params": [p]} for p in parameters()[:2]])
    rate = OneCycleLR(muon, 0.1, 9) if scheduler is OneCycleLR else CyclicLR(muon, 0.001, 0.1, 2)
    rows = []
    for _ in range(4):
        rows.append([(group["lr"], group["momentum"]) for group in muon.param_groups])
        muon.step()
        rate.step()
    return list(zip(*rows, strict=True))


def test_a_rate_that_is_a_tensor_gives_the_same_step(name):
    """As a captured graph needs it."""
    plain, tensor = parameters(), parameters()
    steps(ALONE[name](plain, lr=0.125), plain, 0, 3)
    steps(ALONE[name](tensor, lr=torch.tensor(0.125)), tensor, 0, 3)
    for a, b in zip(plain, tensor, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_compiled_step_is_the_same_step(name):
    eager, compiled = parameters(), parameters()
    optimizers = ALONE[name](eager), ALONE[name](compiled)
    steps(optimizers[0], eager, 0, 3)
    optimizers[1].step = torch.compile(optimizers[1].step, backend="eager")
    steps(optimizers[1], compiled, 0, 3)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("entry", ["kind", "shape", "name"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(name, entry):
    params = parameters()
    optimizer = ALONE[name](params)
    steps(optimizer, params, 0, 2)
    state = copy.deepcopy(optimizer.state_dict())
    own = state["state"][0]
    buffer = next(key for key, value in own.items() if isinstance(value, torch.Tensor) and value.ndim)
    if entry == "kind":
        own[buffer] = None
    elif entry == "shape":
        own[buffer] = torch.zeros(3, 3)
    else:
        own["other"] = torch.zeros(4, 4)
    before = pickle.dumps(optimizer.state_dict())
    with pytest.raises(MuonlabError):
        optimizer.load_state_dict(state)
    assert pickle.dumps(optimizer.state_dict()) == before
