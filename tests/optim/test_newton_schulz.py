"""Orthogonalisation against its exact fp64 oracle, and its symmetries."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orthogonalisation_oracles import (
    assert_relative,
    gaussian,
    oracle,
    rounding,
    spectral_error,
    with_spectrum,
)

from muonlab.errors import MuonlabError
from muonlab.optim.backend import Backend
from muonlab.optim.newton_schulz import aol_rescale_, newton_schulz, newton_schulz_reference, orthogonalise
from muonlab.optim.schedules import SCHEDULES, list_schedules, resolve_schedule

FROBENIUS = [name for name in list_schedules() if not resolve_schedule(name).row_rescaling]
BACKENDS = ["auto", "plain", "gram", Backend("plain", stack=1, strip=2), Backend("gram", stack=2, strip=3)]

shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(FROBENIUS), st.sampled_from(BACKENDS), st.integers(0, 2**16))
def test_newton_schulz_is_the_polynomial_of_the_singular_values(shape, schedule, backend, seed):
    G = gaussian(*shape, seed=seed)
    plain = backend == "plain" or (isinstance(backend, Backend) and backend.form == "plain")
    torch.testing.assert_close(
        newton_schulz(G, schedule, backend=backend),
        oracle(G, schedule),
        atol=max(1e-12, (4 if plain else 32) * rounding(schedule)),
        rtol=0,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["aol", "aol_dion"])
def test_an_aol_schedule_is_the_polynomial_of_the_rescaled_matrix(schedule, backend):
    G = gaussian(2, 9, 6)
    table = resolve_schedule(schedule)
    U, S, Vh = torch.linalg.svd(aol_rescale_(G.clone(), table.margin), full_matrices=False)
    expected = (U * resolve_schedule(table.rows).scalar_map(S).unsqueeze(-2)) @ Vh
    torch.testing.assert_close(newton_schulz(G, schedule, backend=backend), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        newton_schulz(G.mT, schedule, backend=backend), expected.mT, atol=1e-12, rtol=0
    )


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from(FROBENIUS), st.sampled_from(BACKENDS))
def test_scale_invariance(shape, schedule, backend):
    G = gaussian(*shape)
    result = newton_schulz(G, schedule, backend=backend)
    for scale in (1e-200, 3.7, 1e200):
        torch.testing.assert_close(
            newton_schulz(scale * G, schedule, backend=backend),
            result,
            atol=1e-12 + 40 * rounding(schedule),
            rtol=0,
        )
    assert torch.equal(newton_schulz(G * 2.0**40, schedule, backend=backend), result)
    assert torch.equal(newton_schulz(-G, schedule, backend=backend), -result)


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from(FROBENIUS), st.sampled_from(BACKENDS))
def test_transpose_equivariance(shape, schedule, backend):
    G = gaussian(*shape)
    torch.testing.assert_close(
        newton_schulz(G.mT, schedule, backend=backend),
        newton_schulz(G, schedule, backend=backend).mT,
        atol=1e-12 + 40 * rounding(schedule),
        rtol=0,
    )


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from(FROBENIUS), st.sampled_from(BACKENDS))
def test_orthogonal_equivariance(shape, schedule, backend):
    G = gaussian(*shape)
    Q = torch.linalg.qr(gaussian(shape[1], shape[1], seed=1)).Q
    P = torch.linalg.qr(gaussian(shape[2], shape[2], seed=2)).Q
    torch.testing.assert_close(
        newton_schulz(Q @ G @ P, schedule, backend=backend),
        Q @ newton_schulz(G, schedule, backend=backend) @ P,
        atol=1e-12 + 40 * rounding(schedule),
        rtol=0,
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(shapes, max_size=5), st.sampled_from(list_schedules()), st.sampled_from(BACKENDS))
def test_a_list_is_the_same_as_its_matrices_one_by_one(list_of_shapes, schedule, backend):
    matrices = [gaussian(*shape, seed=i) for i, shape in enumerate(list_of_shapes)]
    matrices += [G.mT for G in matrices] + [G[0] for G in matrices]
    before = [G.clone() for G in matrices]
    results = orthogonalise(matrices, schedule, backend=backend)
    assert len(results) == len(matrices)
    for G, kept, result in zip(matrices, before, results, strict=True):
        assert torch.equal(G, kept)
        assert result.is_contiguous()
        assert result.untyped_storage().data_ptr() != G.untyped_storage().data_ptr()
        singles = [
            newton_schulz(single, schedule, backend="plain") for single in G.reshape(-1, *G.shape[-2:])
        ]
        torch.testing.assert_close(
            result, torch.stack(singles).view(G.shape), atol=1e-12 + 40 * rounding(schedule), rtol=0
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_can_replace_the_matrices_also_through_views(backend):
    shapes_ = [(6, 4), (4, 6), (2, 6, 4), (2, 3, 4, 4), (4, 4)]
    matrices = [gaussian(*shape, seed=i) for i, shape in enumerate(shapes_)]
    matrices.append(gaussian(6, 8, seed=9).unflatten(-1, (2, 4)).transpose(0, 1))  # blocks of columns
    expected = orthogonalise(matrices, backend=backend)
    results = orthogonalise(matrices, backend=backend, out=matrices)
    for G, result, right in zip(matrices, results, expected, strict=True):
        assert result is G
        assert torch.equal(G, right)


def test_an_out_of_other_shapes_is_refused():
    matrices = [torch.ones(3, 2), torch.ones(2, 2)]
    for out in ([torch.ones(3, 2)], [torch.ones(2, 3), torch.ones(2, 2)]):
        with pytest.raises(MuonlabError, match="same shapes"):
            orthogonalise(matrices, out=out)


@pytest.mark.parametrize("shape", [(300, 300), (300, 700), (700, 300)])
@pytest.mark.parametrize("backend", ["plain", "gram"])
def test_sizes_whose_products_run_in_strips(shape, backend):
    G = gaussian(*shape)
    torch.testing.assert_close(newton_schulz(G, backend=backend), oracle(G, "jordan"), atol=1e-12, rtol=0)
    assert_relative(newton_schulz(G.float(), backend=backend), oracle(G, "jordan"), 5e-5)


def test_the_reference_is_the_published_iteration():
    # zeropower of Keller Jordan's post for one step, written out by hand for a diagonal matrix
    X = torch.diag(torch.tensor([0.8, 0.6, 0.0], dtype=torch.float64))
    a, b, c = SCHEDULES["jordan"].rows[0]
    expected = torch.diag(torch.tensor([a * x + b * x**3 + c * x**5 for x in (0.8, 0.6, 0.0)]))
    torch.testing.assert_close(newton_schulz_reference(X, [(a, b, c)]), expected.double())


@pytest.mark.parametrize("shape", [(3, 6, 4), (4, 6), (2, 2, 5, 5)])
def test_fast_forms_equal_the_reference(shape):
    G = gaussian(*shape)
    expected = newton_schulz_reference(G / G.norm(dim=(-2, -1), keepdim=True), resolve_schedule("you").rows)
    for backend in BACKENDS:
        torch.testing.assert_close(newton_schulz(G, "you", backend=backend), expected, atol=1e-12, rtol=0)


def test_svd_is_the_polar_factor_also_of_rectangular_matrices():
    # HeavyBall ignores its exact modes for rectangular matrices
    for shape in ((6, 6), (6, 4), (4, 6), (3, 5, 4)):
        P = newton_schulz(gaussian(*shape), "svd")
        n = min(shape[-2:])
        small = P @ P.mT if shape[-2] <= shape[-1] else P.mT @ P
        torch.testing.assert_close(
            small, torch.eye(n, dtype=torch.float64).expand_as(small), atol=1e-12, rtol=0
        )
        symmetric = P.mT @ gaussian(*shape)  # P is polar: Pᵀ G is symmetric positive
        torch.testing.assert_close(symmetric, symmetric.mT, atol=1e-11, rtol=0)
        assert torch.linalg.eigvalsh(symmetric).min() > -1e-11


def test_svd_maps_missing_directions_to_zero():
    G = with_spectrum(torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64), 7)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        values = torch.linalg.svdvals(newton_schulz(G.to(dtype), "svd").double())
        torch.testing.assert_close(
            values, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64), atol=tolerance, rtol=0
        )


SPECTRA = {
    "gaussian": None,
    "decay to 1e-4": torch.logspace(0, -4, 48, dtype=torch.float64),
    "decay to 1e-8": torch.logspace(0, -8, 48, dtype=torch.float64),
    "nearly rank one": torch.cat([torch.ones(1), torch.full((47,), 1e-6)]).double(),
    "half rank": torch.cat([torch.ones(24), torch.zeros(24)]).double(),
    "one over k": 1 / torch.arange(1, 49, dtype=torch.float64),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rows", [48, 144])
@pytest.mark.parametrize(
    "schedule", ["jordan", "you", "polar_express_1.01", "polar_express_1.02", "cans", "deepseek", "cubic"]
)
def test_fp32_error_is_rounding_in_both_forms_on_every_spectrum(schedule, rows, spectrum):
    values = SPECTRA[spectrum]
    G = gaussian(rows, 48) if values is None else with_spectrum(values, rows)
    expected = oracle(G, schedule)
    one = rounding(schedule, torch.float32)
    assert spectral_error(newton_schulz(G.float(), schedule, backend="plain"), expected) < 2 * one
    # XᵀX squares small singular values, so the Gram form loses more of them
    assert spectral_error(newton_schulz(G.float(), schedule, backend="gram"), expected) < 1e-3 + 40 * one


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", ["jordan", "polar_express_1.02", "cans"])
def test_half_precision_gram_form_restarts_often_enough(schedule, dtype, spectrum):
    # without restarts the bf16 Gram form is off by factors up to 1e13 on these spectra
    values = SPECTRA[spectrum]
    G = gaussian(144, 48) if values is None else with_spectrum(values, 144)
    expected = oracle(G, schedule)
    plain = newton_schulz(G, schedule, dtype=dtype, backend="plain")
    gram = newton_schulz(G, schedule, dtype=dtype, backend="gram")
    tolerance = 2 * ((plain - expected).norm() / expected.norm()).item() + 0.05
    assert gram.isfinite().all()
    assert_relative(gram, expected, tolerance)


@pytest.mark.parametrize("schedule", list_schedules())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_stays_zero_and_rank_deficient_stays_finite(schedule, dtype):
    stack = gaussian(3, 6, 5)
    stack[0] = 0
    stack[1, :, 2:] = stack[1, :, :1]
    result = newton_schulz(stack, schedule, dtype=torch.float32 if schedule == "svd" else dtype)
    assert result[0].count_nonzero() == 0
    assert result.isfinite().all()
    assert (result[1:].norm(dim=(-2, -1)) > 0.5).all()


def test_a_non_finite_matrix_spoils_itself_alone():
    good = [gaussian(6, 4, seed=i, dtype=torch.float32) for i in range(3)]
    bad = good[1].clone()
    bad[0, 0] = torch.nan
    results = orthogonalise([good[0], bad, good[2]])
    expected = orthogonalise(good)
    assert results[1].isnan().all()
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[2], expected[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_input(dtype):
    G = gaussian(5, 3).to(dtype).requires_grad_()
    result = newton_schulz(G)
    assert result.dtype is dtype
    assert not result.requires_grad
    # the work dtype on a CPU is at least fp32
    assert_relative(result, oracle(G.detach(), "jordan"), 20 * torch.finfo(dtype).eps)


def test_layout_of_the_input_does_not_matter():
    G = gaussian(4, 8, 6)
    expected = newton_schulz(G.contiguous())
    assert torch.equal(newton_schulz(G.mT.contiguous().mT), expected)
    assert torch.equal(newton_schulz(G.repeat(1, 2, 2)[:, :8, :6]), expected)


def test_an_empty_list_and_an_empty_stack_give_themselves():
    assert orthogonalise([]) == []
    assert newton_schulz(torch.empty(0, 4, 3)).shape == (0, 4, 3)


@pytest.mark.parametrize(
    "G",
    [
        torch.ones(3),
        torch.ones(3, 3, dtype=torch.complex64),
        torch.ones(3, 3, dtype=torch.int64),
        torch.ones(3, 3).to_sparse(),
        torch.ones(3, 0),
    ],
)
def test_what_is_no_real_dense_matrix_is_refused(G):
    with pytest.raises(MuonlabError, match="dense real floating-point"):
        newton_schulz(G)


@pytest.mark.parametrize("unit", ["", "AMX"])
def test_the_work_dtype_follows_the_cpu_only_where_it_is_asked_to(unit, monkeypatch):
    monkeypatch.setattr(sys.modules["muonlab.optim.newton_schulz"], "bf16_unit", lambda: unit)
    G = gaussian(3, 8, 5, dtype=torch.float32)
    asked = newton_schulz(G, dtype="auto")
    torch.testing.assert_close(
        asked, newton_schulz(G, dtype=torch.bfloat16 if unit else torch.float32), rtol=0, atol=0
    )
    torch.testing.assert_close(newton_schulz(G), newton_schulz(G, dtype=torch.float32), rtol=0, atol=0)
    exact = G.double()
    torch.testing.assert_close(newton_schulz(exact, dtype="auto"), newton_schulz(exact), rtol=0, atol=0)


def test_unknown_backends_and_work_dtypes_are_refused():
    with pytest.raises(MuonlabError, match="did you mean 'gram'"):
        newton_schulz(torch.ones(3, 3), backend="gramm")
    with pytest.raises(MuonlabError, match="work dtype"):
        newton_schulz(torch.ones(3, 3), dtype=torch.float8_e4m3fn)
