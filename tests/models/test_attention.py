"""Max logits, entropy and rotary embedding against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.models import attention
from muonlab.models.attention import (
    Attention,
    attention_entropy,
    explicit_attention,
    logit_range,
    rotary_tables,
    rotate,
)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def looped_extremes(q, k):
    """max and min over batch and j <= i of q_i . k_j / sqrt(d), one pair at a time."""
    batch, heads, length, head_dim = q.shape
    group = heads // k.shape[1]
    values = [
        [
            float(q[b, h, i] @ k[b, h // group, j]) / math.sqrt(head_dim)
            for b in range(batch)
            for i in range(length)
            for j in range(i + 1)
        ]
        for h in range(heads)
    ]
    return torch.tensor([max(v) for v in values], dtype=q.dtype), torch.tensor(
        [min(v) for v in values], dtype=q.dtype
    )


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 9),
    head_dim=st.sampled_from([2, 4]),
    shift=st.sampled_from([-50.0, 0.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_extremes_are_those_of_every_causal_pair(batch, kv_heads, group, length, head_dim, shift, seed):
    q = random(batch, kv_heads * group, length, head_dim, seed=seed)
    k = random(batch, kv_heads, length, head_dim, seed=seed + 1)
    q, k = q + shift, k + abs(shift)  # all logits positive, mixed, or all negative
    highest, lowest = looped_extremes(q, k)
    for extremes in (logit_range(q, k), explicit_attention(q, k, k)[2]):
        torch.testing.assert_close(extremes.highest, highest, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(extremes.lowest, lowest, rtol=1e-12, atol=1e-9)


def test_extremes_do_not_depend_on_the_chunks(monkeypatch):
    q, k = random(2, 4, 13, 4), random(2, 2, 13, 4, seed=1)
    whole = logit_range(q, k)
    monkeypatch.setattr(attention, "EXACT_PASS_ELEMENTS", 2 * 4 * 13 * 3)  # three rows at a time
    chunked = logit_range(q, k)
    assert torch.equal(whole.highest, chunked.highest)
    assert torch.equal(whole.lowest, chunked.lowest)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fused_and_explicit_attention_agree_with_their_gradients(kv_heads, monkeypatch):
    monkeypatch.setattr(attention, "EXPLICIT_CONTEXT", 0)
    torch.manual_seed(0)
    module = Attention(32, 4, num_kv_heads=kv_heads).double()
    cos, sin = (t.double().unsqueeze(1) for t in rotary_tables(8, 16, 10_000.0))
    x = random(3, 16, 32).requires_grad_()
    results = []
    for measure_entropy in (False, True):
        out = module(x, cos, sin, measure_entropy)
        gradients = torch.autograd.grad(out.x.square().sum(), [x, *module.parameters()])
        results.append((out.x, *out.logits, *gradients))
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-9, atol=1e-12)


def test_entropy_of_uniform_and_one_hot_attention():
    uniform = torch.ones(2, 3, 5, 5).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    expected = sum(math.log(i) for i in range(1, 6)) / 5
    torch.testing.assert_close(attention_entropy(uniform), torch.full((3,), expected))
    assert torch.equal(attention_entropy(torch.eye(5).expand(2, 3, 5, 5)), torch.zeros(3))


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    cos, sin = (t.double().unsqueeze(1) for t in rotary_tables(8, 12, 10_000.0))
    q, k = random(8).expand(1, 12, 1, 8), random(8, seed=1).expand(1, 12, 1, 8)
    rotated_q, rotated_k = rotate(q, cos, sin)[0, :, 0], rotate(k, cos, sin)[0, :, 0]
    torch.testing.assert_close(rotated_q.norm(dim=-1), q[0, :, 0].norm(dim=-1), rtol=1e-6, atol=0)
    scores = rotated_q @ rotated_k.T
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_rotation_is_autograds():
    cos, sin = (t.double().unsqueeze(1) for t in rotary_tables(6, 5, 100.0))
    assert torch.autograd.gradcheck(rotate, (random(2, 5, 3, 6).requires_grad_(), cos, sin))


def test_soft_cap_bounds_the_logits_and_reports_those_before_it():
    q, k, v = 30 * random(1, 2, 6, 4), 30 * random(1, 2, 6, 4, seed=1), random(1, 2, 6, 4, seed=2)
    capped, _, extremes = explicit_attention(q, k, v, soft_cap=2.0)
    assert extremes.highest.max() > 100
    scores = (q @ k.transpose(-1, -2) / 2).clamp(-1e30)
    scores = (2 * torch.tanh(scores / 2)).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(capped, scores.softmax(-1) @ v, rtol=1e-5, atol=1e-6)
