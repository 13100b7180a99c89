"""A model that changes its dtype after a step: its buffers come along and keep their bits."""

import copy

import pytest
import torch
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim import AdamW, Muon, MuonClip

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        for i, name in enumerate(("query", "key")):
            weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(i))
            self.register_parameter(name, nn.Parameter(weight))
        self.gain = nn.Parameter(torch.ones(4))

    def layouts(self):
        return [AttentionLayout("layer", 2, 2, (HeadRows(self.query, 2),), (HeadRows(self.key, 2),))]

    def groups(self):
        return [{"params": [self.query, self.key]}, {"params": [self.gain], "rule": "adamw"}]


OPTIMIZERS = {
    "muon": lambda m: Muon(m.groups()),
    "corrected": lambda m: Muon(m.groups(), momentum_kind="ema_corrected"),
    "normuon": lambda m: Muon(m.groups(), after=["normuon"], beta2=0.9, weight_decay=0.1),
    "adamw": lambda m: AdamW(m.parameters()),
    "muonclip": lambda m: MuonClip(m.groups(), m.layouts(), tau=10.0),
    "muonclip scale": lambda m: MuonClip(m.groups(), m.layouts(), tau=10.0, clip_momentum="scale"),
    "muonclip project": lambda m: MuonClip(m.groups(), m.layouts(), tau=10.0, clip_momentum="project"),
}


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        for i, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.observe(torch.tensor([5.0, 40.0])[None])
        optimizer.step()


def buffers(optimizer):
    for state in optimizer.state.values():
        yield from (
            value for name, value in state.items() if isinstance(value, torch.Tensor) and name != "step"
        )


@pytest.mark.parametrize("after", DTYPES)
@pytest.mark.parametrize("before", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_as_if_the_state_had_been_saved_and_loaded(name, before, after):
    moved = Layer().to(before)
    optimizer = OPTIMIZERS[name](moved)
    train(moved, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    moved.to(after)

    made = copy.deepcopy(moved)
    other = OPTIMIZERS[name](made)
    other.load_state_dict(state)
    for model, own in ((moved, optimizer), (made, other)):
        train(model, own, 2, first=2)
    expected = torch.promote_types(after, torch.float32)
    assert all(buffer.dtype is expected for buffer in buffers(optimizer))
    # a clip made for fp64 keeps its factors in fp64, one made for 16 bits has them in fp32
    tolerance = {"rtol": 0, "atol": 0} if "clip" not in name or after is not torch.float32 else {}
    for a, b in zip(moved.parameters(), made.parameters(), strict=True):
        assert a.dtype is after
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("between", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_bit_of_an_fp32_buffer_is_lost_on_a_trip_through_another_dtype(name, between):
    model = Layer()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 2)
    before = [buffer.clone() for buffer in buffers(optimizer)]
    step_without_change(model, optimizer, between)
    step_without_change(model, optimizer, torch.float32)
    assert [buffer.dtype for buffer in buffers(optimizer)] == [torch.float32] * len(before)
    for a, b in zip(before, buffers(optimizer), strict=True):
        assert torch.equal(a, b)


def step_without_change(model, optimizer, dtype):
    """One step in this dtype that keeps every buffer: all of the past counts, and nothing is clipped."""
    model.to(dtype)
    kept = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update({"momentum": 1.0} if group["rule"] == "muon" else {"betas": (1.0, 1.0)})
        if group.get("beta2"):
            group["beta2"] = 1.0
        if group.get("momentum_kind") == "ema_corrected":
            group["momentum_kind"] = "ema"
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.observe(torch.tensor([5.0, 5.0])[None])
    optimizer.step()
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)


def test_the_clip_scales_by_factors_as_precise_as_the_weights():
    model = Layer()
    optimizer = MuonClip(model.groups(), model.layouts(), tau=10.0, lr=0.0, adamw_lr=0.0)
    train(model, optimizer, 1)
    model.double()
    before = model.query.detach().clone()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.observe(torch.tensor([30.0, 5.0], dtype=torch.float64)[None])
    optimizer.step()
    torch.testing.assert_close(model.query[:2], before[:2] * (1 / 3) ** 0.5, rtol=1e-15, atol=0)
    assert torch.equal(model.query[2:], before[2:])
    assert optimizer.gammas()[0].dtype is torch.float64
    assert optimizer.clip.trace()["layer"]["last_trigger"].tolist() == [1, 0]


def test_maxima_observed_before_the_change_still_count():
    model = Layer()
    optimizer = MuonClip(model.groups(), model.layouts(), tau=10.0)
    optimizer.observe(torch.tensor([40.0, 5.0])[None])
    model.double()
    optimizer.step()
    assert optimizer.gammas()[0].tolist() == [0.25, 1]


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_made_complex_is_refused_before_anything_is_updated(name):
    model = Layer()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 2)
    model.key.data, model.key.grad = model.key.data.to(torch.complex64), None
    model.key.grad = torch.zeros_like(model.key)
    before = copy.deepcopy((model.state_dict(), list(buffers(optimizer))))
    optimizer.observe(torch.tensor([5.0, 40.0])[None])
    with pytest.raises(MuonlabError, match=r"is torch.complex64; only real floating-point parameters"):
        optimizer.step()
    after = (model.state_dict(), list(buffers(optimizer)))
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
