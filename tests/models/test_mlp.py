"""The feed-forward block's activations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muonlab.models import build_model
from muonlab.models.experts import Experts, group_by_expert
from muonlab.models.mlp import MLP, relu2, swiglu


def test_fast_relu2_is_relu_squared_with_its_gradient():
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = torch.relu(x).square()
    (expected,) = torch.autograd.grad(plain.sin().sum(), x)
    (gradient,) = torch.autograd.grad(relu2(x).sin().sum(), x)
    assert torch.equal(relu2(x), plain)
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(relu2, x)


@pytest.mark.parametrize("clamp", [0.0, 0.5])
def test_a_clamped_swiglu_is_its_equation_in_dense_layers_and_experts(clamp):
    """silu(min(g, c)) min(max(u, -c), c), one number at a time; the experts' by one token for each expert."""

    def unit(g, u):
        if clamp:
            g, u = min(g, clamp), min(max(u, -clamp), clamp)
        return g / (1 + math.exp(-g)) * u

    torch.manual_seed(0)
    dense = MLP(3, 5, "swiglu", clamp=clamp).double()
    experts = Experts(2, 3, 5, clamp).double()
    x = 4 * torch.randn(2, 3, dtype=torch.float64)
    gates = torch.ones(2, 1, dtype=torch.float64)
    out = experts(x, gates, group_by_expert(torch.tensor([[1], [0]]), 2))
    for token, expert in ((0, 1), (1, 0)):
        for weights, actual in (
            ((dense.gate.weight, dense.up.weight, dense.down.weight), dense(x[token])),
            ((experts.gate[expert], experts.up[expert], experts.down[expert]), out[token]),
        ):
            g, u = ((w @ x[token]).tolist() for w in weights[:2])
            hidden = torch.tensor([unit(*pair) for pair in zip(g, u, strict=True)], dtype=torch.float64)
            torch.testing.assert_close(actual, weights[2] @ hidden, rtol=1e-12, atol=1e-12)
            assert not clamp or hidden.abs().max() <= clamp * max(clamp, 0.279)  # -0.278 is silu's minimum


@given(st.floats(0.1, 20), st.integers(0, 99))
def test_a_clamp_changes_only_what_lies_beyond_it(clamp, seed):
    gate, up = (10 * torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))).unbind()
    clamped, plain = swiglu(gate, up, clamp), swiglu(gate, up)
    within = (gate <= clamp) & (up.abs() <= clamp)
    assert torch.equal(clamped[within], plain[within])
    assert (clamped.abs() <= clamp * max(clamp, 0.279) * (1 + 1e-6)).all()  # -0.278 is silu's minimum


def test_every_swiglu_of_a_model_is_clamped():
    torch.manual_seed(0)
    moe = build_model("moe", vocab_size=61, swiglu_clamp=3.0)
    assert {m.clamp for m in moe.modules() if isinstance(m, MLP | Experts)} == {3.0}
    dense = build_model("nanogpt", vocab_size=61, activation="swiglu", swiglu_clamp=2.0)
    assert {m.clamp for m in dense.modules() if isinstance(m, MLP)} == {2.0}
