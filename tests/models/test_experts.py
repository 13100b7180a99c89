"""Routed experts against one token at a time, in fp64 with gradients; and the fast products against the plain."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.models import experts as module
from muonlab.models.experts import Experts, group_by_expert, grouped_products, padded_products


def one_token_at_a_time(experts, x, choices, gates):
    """sum_k g_k down_e(silu(gate_e x) * up_e x), as it is written."""
    out = []
    for token, its_experts, its_gates in zip(x, choices.tolist(), gates, strict=True):
        total = torch.zeros_like(token)
        for e, gate in zip(its_experts, its_gates, strict=True):
            total = total + gate * (
                experts.down[e] @ (F.silu(experts.gate[e] @ token) * (experts.up[e] @ token))
            )
        out.append(total)
    return torch.stack(out)


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 20),
    num_experts=st.integers(1, 9),
    k=st.integers(1, 4),
    skew=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_experts_equal_one_token_at_a_time_with_gradients(tokens, num_experts, k, skew, seed):
    torch.manual_seed(seed)
    k = min(k, num_experts)
    experts = Experts(num_experts, 6, 5).double()
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(tokens, k, dtype=torch.float64, requires_grad=True)
    # Skewed: all tokens to the last k experts, and none to the others.
    rank = torch.arange(num_experts) * skew + torch.rand(tokens, num_experts) * (not skew)
    choices = rank.expand(tokens, -1).topk(k).indices
    groups = group_by_expert(choices, num_experts)
    fast, slow = experts(x, gates, groups), one_token_at_a_time(experts, x, choices, gates)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    inputs = [x, gates, *experts.parameters()]
    direction = torch.randn_like(slow)
    for ours, expected in zip(
        *(torch.autograd.grad(out, inputs, direction) for out in (fast, slow)), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 30), num_experts=st.integers(1, 9), k=st.integers(1, 3), seed=st.integers(0, 1000)
)
def test_every_choice_has_one_place_in_its_experts_group(tokens, num_experts, k, seed):
    torch.manual_seed(seed)
    choices = torch.rand(tokens, num_experts).topk(min(k, num_experts)).indices
    groups = group_by_expert(choices, num_experts)
    flat = choices.flatten()
    assert groups.loads.tolist() == torch.bincount(flat, minlength=num_experts).tolist()
    assert groups.loads.sum() == flat.numel()  # none dropped
    assert torch.equal(groups.order[groups.inverse], torch.arange(flat.numel()))
    assert torch.equal(flat[groups.order], flat.sort().values)
    assert groups.ends[-1] == flat.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", [[3, 3, 10, 12], [12, 12, 12, 12], [0, 0, 0, 12]])
def test_grouped_products_equal_padded_ones_with_gradients(dtype, ends):
    torch.manual_seed(0)
    x = torch.randn(12, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 24, 16, dtype=dtype, requires_grad=True)
    ends = torch.tensor(ends, dtype=torch.int32)
    direction = torch.randn(12, 24, dtype=dtype)
    results = []
    for product in (grouped_products, padded_products):
        out = product(x, weight, ends)
        results.append((out, *torch.autograd.grad(out, (x, weight), direction)))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)


def test_training_in_fp32_uses_the_grouped_product_and_odd_widths_the_padded_one(monkeypatch):
    monkeypatch.setattr(module, "padded_products", lambda *_: pytest.fail("padded"))
    ends = torch.tensor([3, 4], dtype=torch.int32)
    grouped_products(torch.randn(4, 8), torch.randn(2, 12, 8), ends)
    with pytest.raises(pytest.fail.Exception, match="padded"):
        grouped_products(torch.randn(4, 8), torch.randn(2, 11, 8), ends)
