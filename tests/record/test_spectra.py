"""Spectra against closed forms, against torch's own SVD, and against what no change of basis or scale may change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.record.spectra import (
    group_spectra,
    overlap,
    singular_values,
    spectrum,
    stable_rank,
    svd_entropy,
)

MEASURES = ("svd_entropy", "update_svd_entropy", "stable_rank", "overlap", "sigma_max", "frobenius")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(n, seed=0):
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


@st.composite
def stacks(draw):
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))]
    return normal(*shape, seed=draw(st.integers(0, 1000)))


@settings(max_examples=30)
@given(stacks())
def test_singular_values_are_those_of_an_svd(W):
    left, values, right = torch.linalg.svd(W, full_matrices=False)
    measured = spectrum(W)
    torch.testing.assert_close(singular_values(W), values, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(measured.values, values, rtol=1e-7, atol=1e-7)
    # The pair up to its sign: u_1 v_1' is determined.
    pair = torch.einsum("km,kn->kmn", measured.left, measured.right)
    expected = torch.einsum("km,kn->kmn", left[:, :, 0], right[:, 0])
    if values.shape[-1] == 1 or (values[:, 0] - values[:, 1]).min() > 1e-2:
        torch.testing.assert_close(pair, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rows", "cols"), [(7, 7), (9, 4), (4, 9)])
def test_an_orthogonal_matrix_has_entropy_one_and_full_stable_rank(rows, cols):
    r = min(rows, cols)
    values = singular_values(3 * orthogonal(max(rows, cols))[:rows, :cols])
    torch.testing.assert_close(values, torch.full((r,), 3.0, dtype=torch.float64))
    assert svd_entropy(values).item() == pytest.approx(1, abs=1e-12)
    assert stable_rank(values).item() == pytest.approx(r, rel=1e-12)


def test_a_matrix_of_rank_one_has_entropy_zero_and_stable_rank_one():
    values = singular_values(torch.outer(normal(8, seed=1), normal(5, seed=2)))
    assert svd_entropy(values).item() == pytest.approx(0, abs=1e-12)
    assert stable_rank(values).item() == pytest.approx(1, rel=1e-12)


def test_a_diagonal_matrix_has_the_values_of_the_definition():
    values = singular_values(torch.diag(torch.tensor([1.0, -2.0, 3.0])))
    assert values.tolist() == pytest.approx([3, 2, 1])
    p = [9 / 14, 4 / 14, 1 / 14]
    assert svd_entropy(values).item() == pytest.approx(-sum(x * math.log(x) for x in p) / math.log(3))
    assert stable_rank(values).item() == pytest.approx(14 / 9)


@settings(max_examples=30)
@given(stacks(), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_scale_and_rotation_change_neither_entropy_nor_stable_rank(W, scale, seed):
    rotated = scale * orthogonal(W.shape[-2], seed) @ W @ orthogonal(W.shape[-1], seed + 1)
    before, after = singular_values(W), singular_values(rotated)
    torch.testing.assert_close(after, scale * before, rtol=1e-6, atol=1e-7 * scale)
    torch.testing.assert_close(svd_entropy(after), svd_entropy(before), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(stable_rank(after), stable_rank(before), rtol=1e-9, atol=1e-12)
    assert (svd_entropy(after) <= 1 + 1e-12).all()
    assert (stable_rank(after) <= min(W.shape[-2:]) + 1e-9).all()


def measured_overlap(update, weight):
    return overlap(update, spectrum(weight), singular_values(update)[..., 0])


def test_an_update_along_the_top_pair_has_overlap_one_and_one_along_another_none():
    W = normal(9, 5)
    left, _, right = torch.linalg.svd(W)
    for pair, expected in ((0, 1.0), (1, 0.0)):
        update = 0.01 * torch.outer(left[:, pair], right[pair])
        assert measured_overlap(update, W).item() == pytest.approx(expected, abs=1e-7)
    assert measured_overlap(-0.3 * W, W).item() == pytest.approx(-1)


@settings(max_examples=30)
@given(stacks(), st.integers(1001, 2000), st.floats(1e-3, 1e3))
def test_overlap_is_bounded_and_the_same_in_every_basis_and_at_every_size(W, seed, scale):
    update = normal(*W.shape, seed=seed)
    measured = measured_overlap(update, W)
    assert (measured.abs() <= 1 + 1e-9).all()
    values = singular_values(W)
    if values.shape[-1] > 1 and (values[:, 0] - values[:, 1]).min() < 1e-3:
        return  # the top pair is not determined
    left, right = orthogonal(W.shape[-2], seed), orthogonal(W.shape[-1], seed)
    again = measured_overlap(scale * left @ update @ right, left @ W @ right / scale)
    torch.testing.assert_close(again, measured, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(measured_overlap(update.mT, W.mT), measured, rtol=1e-6, atol=1e-8)


def test_overlap_is_the_growth_of_the_largest_singular_value_to_first_order():
    W, update = normal(12, 7, seed=3), normal(12, 7, seed=4)
    size = 1e-6
    growth = (torch.linalg.matrix_norm(W + size * update, 2) - torch.linalg.matrix_norm(W, 2)) / size
    norm = torch.linalg.matrix_norm(update, 2)
    assert (measured_overlap(update, W) * norm).item() == pytest.approx(growth.item(), rel=1e-4)


@pytest.mark.parametrize(("rows", "cols"), [(24, 24), (32, 8)])
def test_updates_that_know_nothing_of_the_weight_overlap_as_the_docstring_says(rows, cols):
    draws = 1500
    weights, updates = normal(draws, rows, cols, seed=5), normal(draws, rows, cols, seed=6)
    unrelated = measured_overlap(updates, weights)
    expected = 1 / (math.sqrt(rows) + math.sqrt(cols))
    assert unrelated.mean().abs() < 4 * expected / math.sqrt(draws)
    # ||dW||_2 comes near sqrt(m) + sqrt(n) from below; at these sizes 5 to 10 % are missing.
    assert expected < unrelated.square().mean().sqrt() < 1.2 * expected
    flat = torch.linalg.qr(updates).Q
    rms = measured_overlap(flat, weights).square().mean().sqrt().item()
    assert rms == pytest.approx(1 / math.sqrt(max(rows, cols)), rel=0.1)


def test_a_group_is_the_mean_over_its_matrices_however_they_are_stored():
    experts, tall, wide = normal(3, 6, 4), normal(8, 5, seed=1), normal(5, 8, seed=2)
    weights = [experts, tall, wide]
    updates = [normal(*w.shape, seed=9) for w in weights]
    singles = [
        (w, u)
        for weight, update in zip(weights, updates, strict=True)
        for w, u in zip(
            weight.reshape(-1, *weight.shape[-2:]), update.reshape(-1, *weight.shape[-2:]), strict=True
        )
    ]
    assert len(singles) == 5
    measured = group_spectra(weights, updates)
    assert set(measured) == set(MEASURES)
    assert all(value.ndim == 0 for value in measured.values())
    values = [torch.linalg.svdvals(w) for w, _ in singles]
    for name, measure in (("svd_entropy", svd_entropy), ("stable_rank", stable_rank)):
        assert measured[name].item() == pytest.approx(torch.stack([measure(v) for v in values]).mean().item())
    assert measured["sigma_max"].item() == pytest.approx(max(v[0].item() for v in values))
    assert measured["frobenius"].item() == pytest.approx(torch.cat([w.flatten() for w, _ in singles]).norm())
    overlaps = torch.stack([measured_overlap(u, w) for w, u in singles])
    assert measured["overlap"].item() == pytest.approx(overlaps.mean().item())


def test_zeros_measure_zero_and_nan_measures_nan():
    W = normal(4, 3)
    unchanged = group_spectra([W], [torch.zeros_like(W)])
    assert unchanged["update_svd_entropy"] == unchanged["overlap"] == 0
    assert all(value == 0 for value in group_spectra([0 * W], [0 * W]).values())
    for bad in (torch.nan, torch.inf):
        broken = W.clone()
        broken[1, 1] = bad
        measured = group_spectra([W, broken], [W, broken])  # as of a run that has just diverged
        assert all(value.isnan() for name, value in measured.items()), measured
        # One broken matrix of a stack leaves the others alone.
        values = singular_values(torch.stack([W, broken]))
        torch.testing.assert_close(values[0], torch.linalg.svdvals(W))
        assert values[1].isnan().all()


def test_one_row_or_column_has_no_entropy_and_stable_rank_one():
    values = singular_values(normal(1, 6))
    assert (svd_entropy(values).item(), stable_rank(values).item()) == (0, pytest.approx(1))


def test_short_dtypes_are_measured_as_the_numbers_they_hold():
    W = normal(2, 6, 4).bfloat16()
    torch.testing.assert_close(singular_values(W), torch.linalg.svdvals(W.double()))
