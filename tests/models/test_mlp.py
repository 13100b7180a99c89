"""The feed-forward block's activations."""

import torch

from muonlab.models.mlp import relu2


def test_fast_relu2_is_relu_squared_with_its_gradient():
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = torch.relu(x).square()
    (expected,) = torch.autograd.grad(plain.sin().sum(), x)
    (gradient,) = torch.autograd.grad(relu2(x).sin().sum(), x)
    assert torch.equal(relu2(x), plain)
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(relu2, x)
