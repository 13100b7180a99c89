"""Orthogonalisation of matrices: U f(S) Vᵀ from G = U S Vᵀ, by matrix products alone.

`newton_schulz_reference` is the equation, for reading and for the tests, which pin the fast iteration to it; beside it,
`_iterate` is that fast iteration, the plain and the Gram form in one loop. `newton_schulz` runs it on one stack,
`orthogonalise` on a list of matrices of any shapes.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, groupby, pairwise
from typing import Literal

import torch
from torch import Tensor

from muonlab.errors import MuonlabError, unknown_name
from muonlab.optim.backend import FORMS, Backend, bf16_unit, blocks, choose_backend
from muonlab.optim.schedule_design import Row, Schedule
from muonlab.optim.schedules import Coefficients, resolve_schedule

WORK_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Below this an fp32 or fp64 maximum has no finite reciprocal. Matrices of such tiny entries are scaled by the
# reciprocal of the limit instead, which brings the smallest denormal back to normal numbers all the same.
_SMALLEST = {torch.float32: 2.0**-120, torch.float64: 2.0**-1000}


def newton_schulz_reference(X: Tensor, rows: Sequence[Row]) -> Tensor:
    """X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X for every row (a, b, c), from a normalised X (..., rows, cols)."""
    for a, b, c in rows:
        A = X @ X.mT
        X = a * X + b * A @ X + c * A @ A @ X
    return X


def _iterate(parts: list[Tensor], row_blocks: Sequence[Sequence[Row]], strip: int) -> list[Tensor]:
    """The iterates of stacks X (batch, n, m), n <= m, after all rows; the stacks are overwritten.

    One step is X <- a X + B X with B = b R + c R² and R = X Xᵀ. R, B and every product of steps Q are
    polynomials of one symmetric matrix and commute, so within a block the steps act on R and Q alone, R <-
    (aI + B) R (aI + B) and Q <- (aI + B) Q; X is multiplied by Q between blocks. Blocks of one row are the
    plain form, one block is the Gram form. The identity is added inside the products, never stored: in bf16
    that halves the error.
    """
    n = parts[0].shape[-2]
    ends = list(accumulate(X.shape[0] for X in parts))
    spans = [slice(end - X.shape[0], end) for X, end in zip(parts, ends, strict=True)]
    R, Q = (parts[0].new_empty(ends[-1], n, n) for _ in range(2))
    if len(row_blocks) < sum(map(len, row_blocks)):
        B, T = torch.empty_like(R), torch.empty_like(R)
    others = [torch.empty_like(X) for X in parts]
    grams = [R[span] for span in spans]
    for block in row_blocks:
        for X, X_gram in zip(parts, grams, strict=True):
            gram_matrix(X, X_gram, strip)
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
        for X, span, Y in zip(parts, spans, others, strict=True):
            _apply(X, Q[span], s, Y)
        parts, others = others, parts
    return parts


def _apply(X: Tensor, Q: Tensor, s: float, out: Tensor) -> None:
    """out = s X + Q X for symmetric Q; if X and out are transposed views, in the order that their memory
    has."""
    if X.stride(-1) == 1:
        torch.baddbmm(X, Q, X, beta=s, out=out)
    else:
        X = X.mT
        torch.baddbmm(X, X, Q, beta=s, out=out.mT)


def newton_schulz(
    G: Tensor,
    schedule: Coefficients = "jordan",
    steps: int | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    backend: str | Backend = "auto",
) -> Tensor:
    """Orthogonalise every matrix of G (..., rows, cols): U f(S) Vᵀ with f near 1; same shape and dtype as G.

    `schedule` is a name of `list_schedules()`, a `Schedule`, one triple (a, b, c) or a list of triples;
    `steps` None runs its usual number (see `resolve_schedule`). "svd" gives the exact polar factor, with
    singular values at the rounding level of the largest mapped to 0. `dtype` is the work dtype (float64,
    float32, bfloat16, float16); None is float32 on every CPU, bfloat16 elsewhere, and float64 for float64 input;
    "auto" is also bfloat16 on a CPU that multiplies it faster (`bf16_unit`). `backend` is "auto", "plain", "gram"
    or a `Backend`.

    Any finite G is safe, 1e-30 or 1e30, rank-deficient or zero (zero gives zero). G is never written to. Not
    differentiable. Raises MuonlabError for complex, sparse, integer or less than two-dimensional G.
    """
    return orthogonalise([G], schedule, steps, dtype, backend)[0]


@torch.no_grad()
def orthogonalise(
    matrices: Sequence[Tensor],
    schedule: Coefficients = "jordan",
    steps: int | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    backend: str | Backend = "auto",
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`newton_schulz` of every tensor (..., rows, cols) of a list, in few large products.

    Matrices of one shape, transposed ones included, are worked on as stacks. Results keep order, shape and
    dtype. The inputs stay as they were, unless `out` names them: results are then written to the tensors of
    `out`, one per matrix and of its shape, which may be the matrices themselves. That takes no memory beyond
    one stack, on a CPU a few matrices.
    """
    schedule = resolve_schedule(schedule, steps)
    for G in matrices:
        _check(G)
    if out is None:
        out = [torch.empty_like(G, memory_format=torch.contiguous_format) for G in matrices]
    else:
        _check_targets(matrices, out)
    classes: dict[tuple, list[int]] = defaultdict(list)
    for i, G in enumerate(matrices):
        rows, cols = G.shape[-2:]
        classes[min(rows, cols), max(rows, cols), G.dtype, G.device].append(i)
    for (n, m, dtype_in, device), members in classes.items():
        work = dtype if isinstance(dtype, torch.dtype) else work_dtype(dtype_in, device, dtype == "auto")
        how = _resolve_backend(backend, n, m, schedule, work, device.type)
        row_blocks = blocks(schedule.rows, how.form, work)
        members.sort(key=lambda i: matrices[i].shape[-2])  # one shape after the other
        inputs = [X for i in members for X in _each_matrix(matrices[i])]
        targets = [X for i in members for X in _each_matrix(out[i])]
        chunks = max(1, -(-len(inputs) // how.stack)) if how.stack else 1
        size = max(1, -(-len(inputs) // chunks))  # equal chunks: a short last one would cost as many calls
        for start in range(0, len(inputs), size):
            shapes = groupby(inputs[start : start + size], key=lambda X: X.shape)
            stacks = [_normalised_stack(list(alike), schedule) for _, alike in shapes]
            if schedule.exact:
                stacks = [_polar_factor(X) for X in stacks]
            else:
                # (batch, n, m): seen from the short side
                tall = [X.shape[-2] == m for X in stacks]
                parts = [(X.mT if turn else X).to(work) for X, turn in zip(stacks, tall, strict=True)]
                parts = _iterate(parts, row_blocks, how.strip)
                stacks = [P.mT if turn else P for P, turn in zip(parts, tall, strict=True)]
            torch._foreach_copy_(targets[start : start + size], [x for X in stacks for x in X.unbind()])
    return list(out)


def _each_matrix(G: Tensor) -> Sequence[Tensor]:
    """Views of the matrices of a tensor (..., rows, cols)."""
    if G.ndim <= 3:
        return (G,) if G.ndim == 2 else G.unbind()
    return [X for part in G.unbind() for X in _each_matrix(part)]


def _normalised_stack(matrices: list[Tensor], schedule: Schedule) -> Tensor:
    """A new stack (batch, rows, cols) of matrices of one shape, normalised in fp32 at least."""
    X = torch.stack(matrices)
    X = X if X.dtype is torch.float64 else X.float()
    normalise_ = aol_rescale_ if schedule.row_rescaling else frobenius_normalise_
    return normalise_(X, schedule.margin)


def _polar_factor(X: Tensor) -> Tensor:
    """U Vᵀ of a stack; directions below max(rows, cols) eps σ_max are rank deficiency and go to 0."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    negligible = S[..., :1] * max(X.shape[-2:]) * torch.finfo(X.dtype).eps
    return (U * S.gt(negligible).unsqueeze(-2)) @ Vh


def work_dtype(dtype: torch.dtype, device: torch.device, auto: bool = False) -> torch.dtype:
    """The default for matrices of `dtype`: float64 for float64, float32 on a CPU, bfloat16 elsewhere.

    auto: bfloat16 too on a CPU that multiplies it faster; then another machine may give other results.
    """
    if dtype is torch.float64:
        return torch.float64
    return torch.float32 if device.type == "cpu" and not (auto and bf16_unit()) else torch.bfloat16


def _resolve_backend(
    backend: str | Backend, n: int, m: int, schedule: Schedule, dtype: torch.dtype, device_type: str
) -> Backend:
    if dtype not in WORK_DTYPES:
        raise MuonlabError(f"the work dtype must be one of {', '.join(map(str, WORK_DTYPES))}, not {dtype}")
    if isinstance(backend, Backend):
        return backend
    if backend not in ("auto", *FORMS):
        raise unknown_name("orthogonalisation backend", backend, ("auto", *FORMS))
    measured = choose_backend(n, m, schedule.rows, dtype, device_type)
    return measured if backend == "auto" else replace(measured, form=backend)


def _check(G: Tensor) -> None:
    if G.ndim < 2 or 0 in G.shape[-2:] or not G.is_floating_point() or G.layout is not torch.strided:
        raise MuonlabError(
            "orthogonalisation takes dense real floating-point tensors (..., rows, cols) of at least 1 x 1, "
            f"not {G.dtype} ({G.layout}) of shape {tuple(G.shape)}"
        )


def _check_targets(matrices: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    shapes, targets = [tuple(G.shape) for G in matrices], [tuple(target.shape) for target in out]
    if targets != shapes:
        raise MuonlabError(f"matrices of shapes {shapes} need an out of the same shapes, not of {targets}")


# ---------------------------------------------------------------- normalisation: singular values start in (0, 1]
def frobenius_normalise_(X: Tensor, margin: float = 1.0) -> Tensor:
    """Divide every matrix of a stack (..., rows, cols) by margin times its Frobenius norm, in place.

    X must be fp32 or fp64: half precisions cannot hold the sum of squares. The entries are first divided by
    their largest magnitude, so no finite matrix overflows or underflows and there is no epsilon that would
    shrink the update of small gradients. A zero matrix stays zero; infinite or NaN entries give NaN.
    """
    scale_to_unit_(X)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    # no norm but that of a zero matrix lies below 2^-75 now: a denormal over _SMALLEST is at least that
    return X.mul_(norm.mul_(margin).clamp_min_(2.0**-80).reciprocal_())


def scale_to_unit_(X: Tensor) -> Tensor:
    """Divide every matrix of an fp32 or fp64 stack by its largest magnitude, in place."""
    largest = torch.maximum(X.amax((-2, -1), keepdim=True), X.amin((-2, -1), keepdim=True).neg_())
    return X.mul_(largest.clamp_min_(_SMALLEST[X.dtype]).reciprocal_())


def aol_rescale_(X: Tensor, margin: float = 1.0) -> Tensor:
    """Almost-orthogonal rescaling of the short side of a stack (..., rows, cols), in place, fp32 or fp64.

    X <- diag(s) X for a wide X, s_i = (Σ_j |X Xᵀ|_ij)^(-1/2), and the same on columns for a tall one; after
    it no singular value exceeds 1 / margin (Prach and Lampert, arXiv 2208.03160; as a start for
    Newton-Schulz: Turbo-Muon, arXiv 2512.04632). This is not a multiple of X: the iteration goes to the
    polar factor of the rescaled matrix. A square matrix is rescaled by rows. Zero rows stay zero.
    """
    scale_to_unit_(X)
    short = X.mT if X.shape[-2] > X.shape[-1] else X
    sums = (short @ short.mT).abs_().sum(-1, keepdim=True)
    short.mul_((sums.where(sums > 0, 1.0) * margin**2).rsqrt_())
    return X


# ---------------------------------------------------------------- symmetric products
# X Xᵀ and products of commuting symmetric matrices need only half of their entries: they are computed in horizontal
# strips from the diagonal to the right edge and mirrored. n / strip strips need (1 + strip / n) / 2 of the
# multiplications. With `strip` 0, or at least n, the product is computed whole, in one batched call.


def gram_matrix(X: Tensor, out: Tensor, strip: int) -> Tensor:
    """out = X Xᵀ for X (batch, n, m); out (batch, n, n) must not overlap X."""
    n = X.shape[-2]
    if not 0 < strip < n:
        return torch.bmm(X, X.mT, out=out)
    for x, c in zip(X, out, strict=True):
        for top, bottom in _strips(n, strip):
            torch.mm(x[top:bottom], x[top:].mT, out=c[top:bottom, top:])
            _mirror(c, top, bottom)
    return out


def symmetric_product(
    C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float, out: Tensor, strip: int
) -> Tensor:
    """out = beta C + alpha A B, all symmetric (batch, n, n), A B = B A; out must not overlap the others."""
    n = out.shape[-1]
    if not 0 < strip < n:
        return torch.baddbmm(C, A, B, beta=beta, alpha=alpha, out=out)
    for added, a, b, c in zip(C, A, B, out, strict=True):
        for top, bottom in _strips(n, strip):
            part = (slice(top, bottom), slice(top, n))
            torch.addmm(added[part], a[top:bottom], b[:, top:], beta=beta, alpha=alpha, out=c[part])
            _mirror(c, top, bottom)
    return out


def _strips(n: int, strip: int) -> list[tuple[int, int]]:
    return [(top, min(top + strip, n)) for top in range(0, n, strip)]


def _mirror(c: Tensor, top: int, bottom: int) -> None:
    """Copy the strip right of the diagonal block to the columns below it."""
    c[bottom:, top:bottom].copy_(c[top:bottom, bottom:].mT)
