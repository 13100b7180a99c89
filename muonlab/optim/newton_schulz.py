"""Orthogonalisation of matrices: U f(S) Vᵀ from G = U S Vᵀ, by matrix products alone.

`newton_schulz` takes one stack, `orthogonalise` a list of matrices of any shapes. Both run `_iterate`,
which holds the plain and the Gram form as one loop; `newton_schulz_reference` is the equation, for reading
and for the tests.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from muonlab.errors import MuonlabError, unknown_name
from muonlab.optim.backend import Backend, blocks, choose_backend
from muonlab.optim.normalisation import aol_rescale_, frobenius_normalise_
from muonlab.optim.products import gram_matrix, symmetric_product
from muonlab.optim.schedules import Coefficients, Row, Schedule, resolve_schedule

WORK_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def newton_schulz_reference(X: Tensor, rows: Sequence[Row]) -> Tensor:
    """X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X for every row (a, b, c); X (..., rows, cols) is already
    normalised."""
    for a, b, c in rows:
        A = X @ X.mT
        X = a * X + b * A @ X + c * A @ A @ X
    return X


def newton_schulz(
    G: Tensor,
    schedule: Coefficients = "jordan",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str | Backend = "auto",
) -> Tensor:
    """Orthogonalise every matrix of G (..., rows, cols): U f(S) Vᵀ with f near 1; same shape and dtype as G.

    `schedule` is a name of `list_schedules()`, a `Schedule`, one triple (a, b, c) or a list of triples;
    `steps` None runs its usual number (see `resolve_schedule`). "svd" gives the exact polar factor, with
    singular values at the rounding level of the largest mapped to 0. `dtype` is the work dtype (float64,
    float32, bfloat16, float16); None is float32 on a CPU, where it is exact enough to test and bf16 is
    often slower, bfloat16 elsewhere, and float64 for float64 input. `backend` is "auto", "plain", "gram" or
    a `Backend`.

    Any finite G is safe, 1e-30 or 1e30, rank-deficient or zero (zero gives zero). G is never written to. Not
    differentiable. Raises MuonlabError for complex, sparse, integer or less than two-dimensional G.
    """
    return orthogonalise([G], schedule, steps, dtype, backend)[0]


@torch.no_grad()
def orthogonalise(
    matrices: Sequence[Tensor],
    schedule: Coefficients = "jordan",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str | Backend = "auto",
) -> list[Tensor]:
    """`newton_schulz` of every tensor (..., rows, cols) of a list, in few large products.

    Matrices of one shape, transposed ones included, are worked on as stacks. The results keep order, shape
    and dtype and are contiguous; they are new tensors (those of one stack share memory), and the inputs
    stay as they were.
    """
    chosen = resolve_schedule(schedule, steps)
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for index, G in enumerate(matrices):
        _check(G)
        short, long = sorted(G.shape[-2:])
        buckets[short, long, G.dtype, G.device].append(index)
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    for indices in buckets.values():
        # tall first: in the stack they are themselves, wide ones are transposed
        indices.sort(key=lambda index: matrices[index].shape[-2] < matrices[index].shape[-1])
        bucket = [matrices[index] for index in indices]
        for index, result in zip(indices, _orthogonalise_bucket(bucket, chosen, dtype, backend), strict=True):
            results[index] = result
    return results


def _orthogonalise_bucket(
    bucket: Sequence[Tensor], schedule: Schedule, dtype: torch.dtype | None, backend: str | Backend
) -> list[Tensor]:
    """Orthogonalise tensors (..., m, n) followed by tensors (..., n, m), m >= n, of one dtype and device."""
    first = bucket[0]
    n, m = sorted(first.shape[-2:])
    dtype = work_dtype(first) if dtype is None else dtype
    if dtype not in WORK_DTYPES:
        raise MuonlabError(f"the work dtype must be one of {', '.join(map(str, WORK_DTYPES))}, not {dtype}")
    chosen = _resolve_backend(backend, n, m, schedule, dtype, first.device.type)

    # views of (batch, m, n), tall ones first
    members, tall = [], 0
    for G in bucket:
        stack = G.reshape(-1, *G.shape[-2:])
        if G.shape[-2] >= G.shape[-1]:
            tall += len(stack)
            members.extend(stack)
        else:
            members.extend(stack.mT)
    out_tall = first.new_empty(tall, m, n)
    out_wide = first.new_empty(len(members) - tall, n, m)

    row_blocks = blocks(schedule.rows, chosen.form, dtype)
    size = chosen.stack or max(1, len(members))
    for start in range(0, len(members), size):
        end = min(start + size, len(members))
        X = _normalised_stack(members[start:end], schedule, dtype)
        k = min(max(tall - start, 0), end - start)
        here_tall, here_wide = out_tall[start : start + k], out_wide[start + k - tall : end - tall]
        if schedule.exact:
            P = _polar_factor(X)
            here_tall.copy_(P[:k])
            here_wide.copy_(P[k:].mT)
        else:
            X, s, Q = _iterate(X, row_blocks, chosen.strip)
            _finish(X[:k], X[:k], Q[:k], s, here_tall)
            _finish(X[k:].mT, Q[k:], X[k:].mT, s, here_wide)  # (s X + X Q)ᵀ

    results, used = [], {True: 0, False: 0}
    for G in bucket:
        is_tall = G.shape[-2] >= G.shape[-1]
        out = out_tall if is_tall else out_wide
        count = G.shape[:-2].numel()
        results.append(out[used[is_tall] : used[is_tall] + count].view(G.shape))
        used[is_tall] += count
    return results


def _normalised_stack(members: Sequence[Tensor], schedule: Schedule, dtype: torch.dtype) -> Tensor:
    """A new stack (batch, m, n) in the work dtype, normalised in at least fp32 before it is rounded to it."""
    wide = torch.float64 if members[0].dtype is torch.float64 else torch.float32
    X = members[0].new_empty(len(members), *members[0].shape, dtype=wide)
    for x, G in zip(X, members, strict=True):
        x.copy_(G)
    normalise_ = aol_rescale_ if schedule.row_rescaling else frobenius_normalise_
    return normalise_(X, schedule.margin).to(dtype)


def _iterate(X: Tensor, row_blocks: Sequence[Sequence[Row]], strip: int) -> tuple[Tensor, float, Tensor]:
    """(X, s, Q) of which s X + X Q is the iterate of X (batch, m, n) after all rows; X is overwritten.

    One step is X <- a X + X B with B = b R + c R² and R = XᵀX. R, B and every product of steps Q are
    polynomials of one symmetric matrix and commute, so within a block the steps act on R and Q alone, R <-
    (aI + B) R (aI + B) and Q <- Q (aI + B); X is multiplied by Q between blocks. Blocks of one row are the
    plain form, one block is the Gram form. The identity is added inside the products, never stored: in bf16
    that halves the error.
    """
    R, B, Q, T = (X.new_empty(X.shape[0], X.shape[2], X.shape[2]) for _ in range(4))
    Y = torch.empty_like(X) if len(row_blocks) > 1 else X
    s = 0.0
    for index, block in enumerate(row_blocks):
        if index:
            X, Y = torch.baddbmm(X, X, Q, beta=s, out=Y), X
        gram_matrix(X, R, strip)
        s, b, c = block[0]
        symmetric_product(R, R, R, b, c, Q, strip)
        if len(block) > 1:
            B.copy_(Q)
            Q.diagonal(dim1=-2, dim2=-1).add_(s)
        for (a, _, _), (a_next, b, c) in pairwise(block):
            symmetric_product(R, R, B, a, 1.0, T, strip)
            symmetric_product(T, T, B, a, 1.0, R, strip)
            symmetric_product(R, R, R, b, c, B, strip)
            Q, T = symmetric_product(Q, Q, B, a_next, 1.0, T, strip), Q
            s = 0.0
    return X, s, Q


def _polar_factor(X: Tensor) -> Tensor:
    """U Vᵀ of a tall stack; directions below m eps σ_max are taken for rank deficiency and mapped to 0."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    negligible = S[..., :1] * X.shape[-2] * torch.finfo(X.dtype).eps
    return (U * S.gt(negligible).unsqueeze(-2)) @ Vh


def _finish(X: Tensor, A: Tensor, B: Tensor, s: float, out: Tensor) -> None:
    """out = s X + A B, also when out has another dtype."""
    if out.dtype is X.dtype:
        torch.baddbmm(X, A, B, beta=s, out=out)
    else:
        out.copy_(torch.baddbmm(X, A, B, beta=s))


def work_dtype(G: Tensor) -> torch.dtype:
    """The default: float64 for float64, float32 on a CPU, bfloat16 elsewhere."""
    if G.dtype is torch.float64:
        return torch.float64
    return torch.float32 if G.device.type == "cpu" else torch.bfloat16


def _resolve_backend(
    backend: str | Backend, n: int, m: int, schedule: Schedule, dtype: torch.dtype, device_type: str
) -> Backend:
    if isinstance(backend, Backend):
        return backend
    if backend not in ("auto", "plain", "gram"):
        raise unknown_name("orthogonalisation backend", backend, ("auto", "plain", "gram"))
    chosen = choose_backend(n, m, schedule.rows, dtype, device_type)
    return chosen if backend == "auto" else replace(chosen, form=backend)


def _check(G: Tensor) -> None:
    if G.ndim < 2 or 0 in G.shape[-2:] or not G.is_floating_point() or G.layout is not torch.strided:
        raise MuonlabError(
            "orthogonalisation takes dense real floating-point tensors (..., rows, cols) of at least 1 x 1, "
            f"not {G.dtype} ({G.layout}) of shape {tuple(G.shape)}"
        )
