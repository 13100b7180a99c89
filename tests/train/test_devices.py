"""What a device must do as the CPU does; every body runs on the CPU too, so that a GPU finds no fault of the test."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch

from muonlab.models import build_model
from muonlab.models.attention import attend
from muonlab.models.experts import GROUPED_DTYPES, grouped_products, padded_products
from muonlab.models.explicit_attention import explicit_attention
from muonlab.models.max_logits import logit_extremes
from muonlab.optim import build_optimizer
from muonlab.optim.newton_schulz import newton_schulz, newton_schulz_reference
from muonlab.optim.schedules import resolve_schedule

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(device="cpu", **settings):
    """A model, its optimizer, and a step on batch i, in fp32 throughout."""
    torch.manual_seed(0)
    model = build_model("nanogpt", vocab_size=61, context=32, d_model=32, num_layers=2, num_heads=2).to(
        device
    )
    optimizer = build_optimizer("muonclip", model, lr=0.02, tau=0.5, ns_dtype="float32", **settings)
    tokens = torch.randint(61, (8, 2, 33), generator=torch.Generator().manual_seed(0)).to(device)

    def step(i):
        optimizer.zero_grad(set_to_none=True)
        model(tokens[i, :, :-1], tokens[i, :, 1:]).loss.backward()
        optimizer.observe(model.max_logits())
        optimizer.step()

    return model, optimizer, step


def assert_alike(model, expected, device, rtol=1e-3, atol=1e-4):
    """To the bit on the CPU."""
    for own, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        if device == "cpu":
            assert torch.equal(own, other)
        else:
            torch.testing.assert_close(own.cpu(), other.cpu(), rtol=rtol, atol=atol)


@devices
@pytest.mark.parametrize("shape", [(48, 48), (3, 40, 96), (2, 96, 40)])
@pytest.mark.parametrize("backend", ["plain", "gram"])
def test_newton_schulz_in_bf16_is_the_equation_in_fp64_up_to_its_rounding(device, shape, backend):
    G = draw(*shape)
    schedule = resolve_schedule("jordan")
    X = G.double() / torch.linalg.vector_norm(G.double(), dim=(-2, -1), keepdim=True)
    expected = newton_schulz_reference(X if shape[-2] <= shape[-1] else X.mT, schedule.rows)
    expected = expected if shape[-2] <= shape[-1] else expected.mT
    actual = newton_schulz(G.to(device), dtype=torch.bfloat16, backend=backend).cpu().double()
    assert torch.linalg.vector_norm(actual - expected) < 0.03 * torch.linalg.vector_norm(expected)


@devices
@pytest.mark.parametrize("documents", [False, True])
def test_latent_attentions_narrower_values_are_attended_to_as_explicitly(device, documents, monkeypatch):
    """Queries and keys of 96, values of 64, as in moe_m: output, maxima and gradients."""
    monkeypatch.setattr("muonlab.models.attention.EXPLICIT_CONTEXT", 0)
    q, k, v = (
        draw(2, 3, 130, width, seed=i).to(device).requires_grad_() for i, width in enumerate((96, 96, 64))
    )
    ids = (draw(2, 130, seed=5) > 1).long().cumsum(1).to(device) if documents else None
    out, logits, _ = attend(q, k, v, documents=ids)
    expected, _, extremes = explicit_attention(q, k, v, documents=ids)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    for ends, exact in zip(logit_extremes([logits]), extremes, strict=True):
        torch.testing.assert_close(ends[0], exact, rtol=1e-3, atol=1e-3)
    gradients = [torch.autograd.grad(each.square().sum(), (q, k, v)) for each in (out, expected)]
    for own, explicit in zip(*gradients, strict=True):
        torch.testing.assert_close(own, explicit, rtol=1e-3, atol=1e-3)


@devices
def test_grouped_products_are_the_padded_ones_where_experts_have_no_token_too(device):
    assert torch.bfloat16 in GROUPED_DTYPES[device]
    ends = torch.tensor([5, 5, 12, 40], dtype=torch.int32, device=device)
    x, weight = draw(40, 32).to(device, torch.bfloat16), draw(4, 48, 32, seed=1).to(device, torch.bfloat16)
    results = []
    for product in (grouped_products, padded_products):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = product(*leaves, ends)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for grouped, padded in zip(*results, strict=True):
        scale = padded.abs().max().item()
        torch.testing.assert_close(grouped, padded, rtol=2e-2, atol=2e-2 * scale)


@devices
def test_a_step_that_the_gradient_scaler_skips_changes_nothing_and_the_next_is_the_unscaled_one(device):
    model, optimizer, _ = trained(device)
    expected, _, plain_step = trained(device)
    plain_step(1)
    before = copy.deepcopy(model)
    tokens = torch.randint(61, (8, 2, 33), generator=torch.Generator().manual_seed(0)).to(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**127, backoff_factor=2.0**-120)
    for i in (0, 1):
        optimizer.clip.forget()
        optimizer.zero_grad(set_to_none=True)
        overflow = 2.0**60 if i == 0 else 1.0
        scaler.scale(overflow * model(tokens[i, :, :-1], tokens[i, :, 1:]).loss).backward()
        optimizer.observe(model.max_logits())
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.steps_done == i
        if i == 0:
            assert_alike(model, before, "cpu")
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


@devices
def test_a_checkpoint_of_the_cpu_goes_on_on_the_device_and_back(device):
    expected, _, step = trained()
    for i in range(6):
        step(i)
    saved = None
    for first, place in ((0, "cpu"), (2, device), (4, "cpu")):
        model, optimizer, step = trained(place)
        if saved is not None:
            state = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        for i in (first, first + 1):
            step(i)
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        saved = buffer.getvalue()
    assert optimizer.steps_done == 6
    assert_alike(model, expected, device, rtol=1e-2, atol=1e-3)


@devices
def test_steps_on_a_stream_of_their_own_are_those_on_the_default_one(device):
    expected, _, step = trained(device)
    model, _, own_step = trained(device)
    stream = torch.cuda.Stream() if device == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    for i in range(3):
        step(i)
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            own_step(i)
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
    assert_alike(model, expected, device)
