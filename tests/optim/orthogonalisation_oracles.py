"""Exact fp64 answers for orthogonalisation, and what rounding may do to them."""

from functools import cache

import torch
from torch import Tensor

from muonlab.optim.schedules import resolve_schedule


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: Tensor, rows: int, seed: int = 0) -> Tensor:
    """A (rows, len(values)) fp64 matrix with these singular values and random singular vectors."""
    U, _, Vh = torch.linalg.svd(gaussian(rows, len(values), seed=seed), full_matrices=False)
    return (U * values) @ Vh


def oracle(G: Tensor, schedule: str) -> Tensor:
    """U f(S / ||G||) Vᵀ in fp64, for a schedule that normalises by the Frobenius norm."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    S = S / S.norm(dim=-1, keepdim=True)
    return (U * resolve_schedule(schedule).scalar_map(S).unsqueeze(-2)) @ Vh


@cache
def rounding(schedule: str, dtype: torch.dtype = torch.float64) -> float:
    """What rounding of X by eps can do to f(X): eps times the steepest slope of f on [0, 1].

    485 eps for Jordan's rows, but 49,000 eps for CANS, which is steep where a rank-one matrix lies, at 1.
    """
    if schedule == "svd":
        return 1e-12
    x = torch.linspace(0, 1, 10_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(resolve_schedule(schedule).scalar_map(x).sum(), x)
    return torch.finfo(dtype).eps * slope.abs().max().item()


def assert_relative(result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (result.double() - expected).norm() <= tolerance * expected.norm()


def spectral_error(result: Tensor, expected: Tensor) -> float:
    return torch.linalg.matrix_norm(result.double() - expected, 2).item()
