"""What one optimizer object keeps and restores: state over dtypes and copies, one schedule and step count."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim import AdamW, Muon, MuonClip

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype=torch.float32):
    return [nn.Parameter(draw(4, 6, dtype=dtype)), nn.Parameter(draw(6, seed=1, dtype=dtype))]


def groups(params):
    return [{"params": [("w", params[0])]}, {"params": [("g", params[1])], "rule": "adamw"}]


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for param in params:
            param.grad = draw(*param.shape, seed=100 + step, dtype=param.dtype)
        optimizer.step()


def saved(state):
    """Through a file, as a checkpoint goes, with nothing but tensors and plain values allowed."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SETTINGS = [
    {},
    {"momentum_kind": "ema_corrected"},
    {"after": ["normuon"], "beta2": 0.9, "ns_schedule": [(2.0, -1.5, 0.5)] * 4, "weight_decay": 0.1},
    {
        "row_blocks": [3, 1],
        "after": ["normuon"],
        "beta2": 0.9,
        "weight_decay_kind": "independent",
        "weight_decay": 0.1,
    },
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(dtype, settings):
    straight = parameters(dtype)
    whole = Muon(groups(straight), **settings)
    train(whole, straight, 3)
    state, weights = saved(whole.state_dict()), [p.detach().clone() for p in straight]
    train(whole, straight, 3, first=3)

    resumed = [nn.Parameter(w) for w in weights]
    other = Muon(groups(resumed), **settings)
    other.load_state_dict(state)
    assert other.steps_done == 3
    train(other, resumed, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert_equal(whole.state_dict(), other.state_dict())


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("other", DTYPES[1:])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_state_survives_a_trip_through_parameters_of_another_dtype(dtype, other):
    """torch's own load casts a momentum to the parameter's dtype, so that fp32 -> bf16 -> fp32 loses bits."""
    first, second, third = (parameters(d) for d in (dtype, other, dtype))
    optimizer = Muon(groups(first))
    train(optimizer, first, 2)
    state = saved(optimizer.state_dict())
    for params in (second, third):
        there = Muon(groups(params))
        there.load_state_dict(state)
        state = saved(there.state_dict())
    assert_equal(state, optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_updated_in_fp32_and_rounded_once(dtype):
    low = parameters(dtype)
    high = [nn.Parameter(p.detach().float()) for p in low]
    grads = [draw(*p.shape, seed=9, dtype=dtype) for p in low]
    for params in (low, high):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(param.dtype)
        Muon(groups(params), weight_decay=0.1).step()
    for a, b in zip(low, high, strict=True):
        assert torch.equal(a, b.to(dtype))


def test_a_copy_keeps_the_step_count_and_trains_on_alike():
    params = parameters()
    optimizer = Muon(groups(params))
    train(optimizer, params, 2)
    twin = copy.deepcopy(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    train(optimizer, params, 2, first=2)
    train(twin, twins, 2, first=2)
    assert twin.steps_done == 4
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_an_optimizer_can_be_made_from_the_groups_of_another():
    """Also after a warm-up step: the peak learning rate, to which independent decay is relative, goes along."""
    optimizer = Muon(groups(parameters()), lr=0.1, weight_decay=0.1, weight_decay_kind="independent")
    LambdaLR(optimizer, lambda _: 0.5)
    other = Muon(optimizer.param_groups)
    assert_equal(other.state_dict()["param_groups"], optimizer.state_dict()["param_groups"])
    assert other.param_groups[0]["peak_lr"] == 0.1


def test_one_schedule_multiplies_every_groups_learning_rate():
    optimizer = Muon(groups(parameters()), lr=0.1, adamw_lr=0.01)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005]


def test_a_parameter_without_a_gradient_is_left_alone():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = Muon(groups(params), weight_decay=0.5, adamw_weight_decay=0.5)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert not optimizer.state
    params[1].grad = torch.ones(6)
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: AdamW(p), "the saved state has 2 parameter groups, this optimizer 1"),
        (
            lambda p: AdamW([{"params": [p[0]]}, {"params": [p[1]]}]),
            "'group_0' is under adamw, but was saved under muon",
        ),
        (
            lambda p: Muon([{"params": [("v", p[0])]}, {"params": [("g", p[1])], "rule": "adamw"}]),
            "'group_0' does not hold the parameters that were saved",
        ),
    ],
)
def test_a_state_of_another_optimizer_is_refused(build, message):
    with pytest.raises(MuonlabError, match=message):
        build(parameters()).load_state_dict(Muon(groups(parameters())).state_dict())


def clipped(windows=None):
    q, k = (nn.Parameter(draw(4, 4, seed=i)) for i in range(2))
    layout = AttentionLayout("layer", 2, 2, (HeadRows(q, 2),), (HeadRows(k, 2),))
    return [q, k], MuonClip([q, k], [layout], tau=10.0, lr=0.01, windows=windows)


def test_the_clip_counts_the_optimizers_steps_also_after_a_resume():
    _, optimizer = clipped(windows=[[2, 3]])
    seen = []
    for step in range(4):
        if step == 1:
            state = saved(optimizer.state_dict())
            _, optimizer = clipped(windows=[[2, 3]])
            optimizer.load_state_dict(state)
        optimizer.observe(torch.tensor([5.0, 40.0])[None])
        optimizer.step()
        seen.append(optimizer.gammas()[0].tolist())
    assert seen == [[1, 1], [1, 1], [1, 0.25], [1, 1]]


def test_the_clips_history_is_part_of_the_state():
    _, optimizer = clipped()
    optimizer.observe(torch.tensor([5.0, 40.0])[None])
    optimizer.step()
    _, other = clipped()
    other.load_state_dict(saved(optimizer.state_dict()))
    assert_equal(other.clip.trace(), optimizer.clip.trace())


def test_a_state_without_a_clip_loads_into_an_optimizer_with_one_and_back():
    params, with_clip = clipped()
    without = Muon(params)
    with_clip.load_state_dict(without.state_dict())
    without.load_state_dict(with_clip.state_dict())
    assert without.gammas() is None


def test_maxima_are_forgotten_after_the_step():
    _, optimizer = clipped()
    for maxima, gamma in (([5.0, 40.0], [1, 0.25]), ([5.0, 5.0], [1, 1])):
        optimizer.observe(torch.tensor(maxima)[None])
        optimizer.step()
        assert optimizer.gammas()[0].tolist() == gamma


def test_observing_without_a_clip_does_nothing():
    optimizer = Muon(groups(parameters()))
    optimizer.observe(torch.tensor([1e9])[None])
    optimizer.step()
    assert optimizer.gammas() is None


@pytest.mark.parametrize("momentum", ["keep", "scale", "project"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("use_closure", [True, False])
def test_a_step_whose_max_logits_were_not_observed_is_refused_before_anything_is_updated(
    momentum, steps, use_closure
):
    q, k = (nn.Parameter(draw(4, 4, seed=i)) for i in range(2))
    gain = nn.Parameter(draw(4))
    layout = AttentionLayout("layer", 2, 2, (HeadRows(q, 2),), (HeadRows(k, 2),))
    optimizer = MuonClip(
        [{"params": [q, k]}, {"params": [gain], "rule": "adamw"}], [layout], clip_momentum=momentum
    )
    params = [q, k, gain]
    for step in range(steps):
        optimizer.observe(torch.tensor([5.0, 400.0])[None])
        train(optimizer, params, 1, first=step)
    for param in params:
        param.grad = draw(*param.shape, seed=9)
    before = copy.deepcopy((optimizer.state_dict(), [p.detach().clone() for p in params]))
    with pytest.raises(MuonlabError, match=f"no max logits for step {steps}; call observe"):
        optimizer.step(*([lambda: torch.tensor(1.0)] if use_closure else []))
    state, weights = optimizer.state_dict(), [p.detach() for p in params]
    for name in ("state", "param_groups", "steps_done"):
        assert_equal(state[name], before[0][name])
    assert all(torch.equal(a, b) for a, b in zip(weights, before[1], strict=True))
    assert_equal(named(state["clip"]), named(before[0]["clip"]))
    # once they are observed, the same step is taken as if it had not been tried
    optimizer.observe(torch.tensor([5.0, 400.0])[None])
    optimizer.step()
    assert optimizer.steps_done == steps + 1
    assert optimizer.gammas()[0].tolist() == [1, 0.25]


def named(clip):
    """A clip's state with NaN, its value for never observed, as a number."""
    return {**clip, "history": {name: values.nan_to_num() for name, values in clip["history"].items()}}


def test_outside_its_windows_the_clip_needs_no_max_logits():
    params, optimizer = clipped(windows=[[1, 2]])
    train(optimizer, params, 1)
    with pytest.raises(MuonlabError, match="no max logits for step 1"):
        optimizer.step()


@pytest.mark.parametrize("momentum", ["scale", "project"])
def test_the_clip_reaches_the_momentum(momentum):
    q, k = (nn.Parameter(draw(4, 4, seed=i)) for i in range(2))
    layout = AttentionLayout("layer", 2, 2, (HeadRows(q, 2),), (HeadRows(k, 2),))
    optimizer = MuonClip([q, k], [layout], tau=10.0, clip_momentum=momentum)
    for param in (q, k):
        param.grad = draw(4, 4, seed=5)
    optimizer.observe(torch.tensor([5.0, 40.0])[None])
    optimizer.step()
    expected = 0.05 * draw(4, 4, seed=5)
    for param in (q, k):
        assert torch.allclose(optimizer.state[param]["momentum_buffer"][:2], expected[:2])
        assert not torch.allclose(optimizer.state[param]["momentum_buffer"][2:], expected[2:])


def test_a_compiled_step_is_the_same_step():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    eager, compiled = parameters(), parameters()
    optimizers = Muon(groups(eager), weight_decay=0.1), Muon(groups(compiled), weight_decay=0.1)
    train(optimizers[0], eager, 3)
    optimizers[1].step = torch.compile(optimizers[1].step, backend=count)
    train(optimizers[1], compiled, 3)
    assert graphs
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
