"""The fast RMSNorm against torch's."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from muonlab.models.norm import RMSNorm


@given(
    rows=st.integers(1, 7),
    size=st.integers(1, 9),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_torchs(rows, size, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(2, rows, size, dtype=torch.float64, generator=generator)).requires_grad_()
    norm = RMSNorm(size).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(size, dtype=torch.float64, generator=generator))
    weights = torch.randn(2, rows, size, dtype=torch.float64, generator=generator)
    plain = torch.nn.functional.rms_norm(x, (size,), norm.weight, norm.eps)
    torch.testing.assert_close(norm(x), plain, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad((y * weights).sum(), [x, norm.weight]) for y in (norm(x), plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 / scale)
