"""Strip products of symmetric results against the whole product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.optim.products import commuting_product, gram_matrix, quadratic


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 13))
def test_strips_equal_the_whole_product(batch, m, n, strip):
    X = torch.randn(batch, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(m * n))
    A = gram_matrix(X, torch.full((batch, n, n), torch.nan, dtype=torch.float64), strip)
    torch.testing.assert_close(A, X.mT @ X, atol=1e-12, rtol=1e-12)
    assert torch.equal(A, A.mT) or strip == 0 or strip >= n
    square = commuting_product(A, A, torch.full_like(A, torch.nan), strip)
    torch.testing.assert_close(square, A @ A, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("strip", [0, 4])
@pytest.mark.parametrize("c", [2.0315, 0.0])
def test_quadratic_is_its_polynomial(strip, c):
    X = torch.randn(2, 9, 9, dtype=torch.float64)
    A = X.mT @ X
    W = quadratic(A, (3.4445, -4.775, c), torch.full_like(A, torch.nan), strip)
    expected = 3.4445 * torch.eye(9, dtype=torch.float64) - 4.775 * A + c * A @ A
    torch.testing.assert_close(W, expected, atol=1e-10, rtol=1e-12)
