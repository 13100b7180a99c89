"""Eigenvalues where a solver fails, as cuSOLVER and MKL do on covariances of low rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muonlab.optim.eigen import eigen


@given(n=st.integers(1, 24), rank=st.integers(0, 24), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_they_are_of_the_matrix(n, rank, batch, seed):
    X = torch.randn(batch, n, min(n, rank), generator=torch.Generator().manual_seed(seed))
    A = X @ X.mT
    values, Q = eigen(A)
    torch.testing.assert_close((Q * values[:, None]) @ Q.mT, A, rtol=1e-4, atol=1e-4 * (1 + A.abs().amax()))
    torch.testing.assert_close(Q.mT @ Q, torch.eye(n).expand_as(A), rtol=0, atol=1e-5)
    assert (values.diff() >= 0).all()


def test_what_fails_in_fp32_is_solved_in_fp64_and_returned_in_fp32(monkeypatch):
    solve, seen = torch.linalg.eigh, []

    def fails_in_fp32(A):
        seen.append(A.dtype)
        if A.dtype is torch.float32:
            raise RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")
        return solve(A)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_fp32)
    A = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
    values, vectors = eigen(A)
    assert seen == [torch.float32, torch.float64]
    assert values.tolist() == [1, 2, 3]
    assert values.dtype == vectors.dtype == torch.float32


def test_what_no_solver_can_do_is_torchs_error(monkeypatch):
    seen = []

    def fails(A):
        seen.append(A.dtype)
        raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):
        eigen(torch.eye(2))
    assert seen == [torch.float32, torch.float64]
