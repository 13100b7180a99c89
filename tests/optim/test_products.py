"""Strip products of symmetric results against the whole product."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.optim.newton_schulz import gram_matrix, symmetric_product


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 13),
    st.sampled_from([0.0, -4.775]),
)
def test_strips_equal_the_whole_product(batch, m, n, strip, beta):
    X = torch.randn(batch, n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(m * n))
    A = gram_matrix(X, torch.full((batch, n, n), torch.nan, dtype=torch.float64), strip)
    torch.testing.assert_close(A, X @ X.mT, atol=1e-12, rtol=1e-12)
    A = (A + A.mT) / 2
    square = A @ A
    result = symmetric_product(A, A, square, beta, 2.0315, torch.full_like(A, torch.nan), strip)
    torch.testing.assert_close(result, beta * A + 2.0315 * A @ square, atol=1e-10, rtol=1e-12)
    if 0 < strip < n:  # entries outside the diagonal blocks are copies, not computed twice
        for top in range(0, n, strip):
            bottom = min(top + strip, n)
            assert torch.equal(result[:, top:bottom, bottom:], result[:, bottom:, top:bottom].mT)
