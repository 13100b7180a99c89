"""Entropy, one-hot rows, soft-cap and rotary embedding against their definitions."""

import math

import pytest
import torch

from muonlab.models.attention import rotary_tables, rotate
from muonlab.models.explicit_attention import attention_entropy, explicit_attention, one_hot_share


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_entropy_of_uniform_and_one_hot_attention():
    uniform = torch.ones(2, 3, 5, 5).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    expected = sum(math.log(i) for i in range(1, 6)) / 5
    torch.testing.assert_close(attention_entropy(uniform), torch.full((3,), expected))
    assert torch.equal(attention_entropy(torch.eye(5).expand(2, 3, 5, 5)), torch.zeros(3))


def test_one_hot_rows_are_counted_beyond_the_first_position():
    weights = torch.eye(4).repeat(2, 2, 1, 1)  # (B, H, T, T), all rows one-hot
    weights[0, 0, 2] = torch.tensor([0.04, 0.0, 0.96, 0.0])  # still
    weights[0, 0, 3] = torch.tensor([0.06, 0.0, 0.0, 0.94])  # no more
    weights[1, 1, 1:] = 0.25
    torch.testing.assert_close(one_hot_share(weights), torch.tensor([5 / 6, 3 / 6]))
    assert torch.equal(one_hot_share(torch.ones(2, 2, 1, 1)), torch.zeros(2))


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


@pytest.mark.parametrize("autocast", [False, True])
def test_a_softmax_in_bf16_rounds_the_logits_and_reports_those_before_it(autocast):
    q, k, v = (4 * random(2, 3, 6, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    exact, _, extremes = explicit_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, weights, rounded_extremes = explicit_attention(q, k, v, softmax_dtype=torch.bfloat16)
    scores = (q @ k.mT / 8**0.5).bfloat16()
    scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    assert weights.dtype is torch.bfloat16
    torch.testing.assert_close(weights, scores.softmax(-1), rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(rounded_extremes, extremes)
    assert (out - exact).abs().max() > 1e-3


def test_soft_cap_bounds_the_logits_and_reports_those_before_it():
    q, k, v = 30 * random(1, 2, 6, 4), 30 * random(1, 2, 6, 4, seed=1), random(1, 2, 6, 4, seed=2)
    capped, _, extremes = explicit_attention(q, k, v, soft_cap=2.0)
    assert extremes.highest.max() > 100
    scores = (q @ k.transpose(-1, -2) / 2).clamp(-1e30)
    scores = (2 * torch.tanh(scores / 2)).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(capped, scores.softmax(-1) @ v, rtol=1e-5, atol=1e-6)
