"""Normalisation of any finite gradient: no overflow, no underflow, no epsilon."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.optim.newton_schulz import aol_rescale_, frobenius_normalise_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1.0, 1.02])
def test_any_finite_scale_gives_the_same_matrix(dtype, margin):
    info = torch.finfo(dtype)
    unit = torch.randn(3, 5, 4, dtype=torch.float64)
    unit /= unit.abs().amax((-2, -1), keepdim=True)
    expected = unit / (margin * unit.norm(dim=(-2, -1), keepdim=True))
    for scale in (info.max, 1e30, 1.0, 1e-30, info.tiny * 2**30):
        X = frobenius_normalise_((unit * scale).to(dtype), margin)
        torch.testing.assert_close(
            X.double(), expected, atol=4 * info.eps, rtol=1e-4 * (scale < 1e-30) + 4 * info.eps
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_denormal_becomes_one(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    X = torch.zeros(1, 3, 3, dtype=dtype)
    X[0, 1, 2] = smallest
    assert X[0, 1, 2] > 0
    frobenius_normalise_(X)
    assert X.sum() == X[0, 1, 2] == 1


@pytest.mark.parametrize("normalise_", [frobenius_normalise_, aol_rescale_])
def test_a_zero_matrix_stays_zero_beside_others(normalise_):
    X = torch.randn(3, 6, 4)
    X[1] = 0
    normalise_(X)
    assert X.isfinite().all()
    assert X[1].count_nonzero() == 0
    assert (X[[0, 2]].norm(dim=(-2, -1)) > 0.1).all()


@pytest.mark.parametrize("normalise_", [frobenius_normalise_, aol_rescale_])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_matrix_spoils_itself_alone(normalise_, bad):
    X = torch.randn(3, 6, 4)
    alone = normalise_(X[[0, 2]].clone())
    X[1, 2, 3] = bad
    normalise_(X)
    assert torch.equal(X[[0, 2]], alone)
    assert X[1].isnan().any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 2**16), st.sampled_from([0.0, 1e-6, 1.0]))
def test_aol_brings_every_singular_value_to_at_most_one(n, extra, seed, noise):
    generator = torch.Generator().manual_seed(seed)
    m = n + extra
    # near rank one to full rank
    X = torch.randn(1, m, 1, generator=generator, dtype=torch.float64) @ torch.randn(
        1, 1, n, generator=generator, dtype=torch.float64
    )
    X = X + noise * torch.randn(1, m, n, generator=generator, dtype=torch.float64)
    assert torch.linalg.svdvals(aol_rescale_(X.clone())).max() <= 1 + 1e-12
    assert torch.linalg.svdvals(aol_rescale_(X.clone(), 1.18)).max() <= 1 / 1.18 + 1e-12


def test_aol_leaves_a_rank_one_matrix_at_exactly_one():
    X = torch.outer(torch.randn(6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)).unsqueeze(0)
    assert torch.linalg.svdvals(aol_rescale_(X)).max() == pytest.approx(1.0, abs=1e-12)
