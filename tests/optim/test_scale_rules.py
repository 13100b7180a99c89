"""Every scale rule fixes the quantity that its name says, for exactly orthogonal updates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.optim import newton_schulz
from muonlab.optim.muon_rule import SCALE_RULES

SIZES = st.integers(1, 12)


def orthogonal(rows, cols):
    generator = torch.Generator().manual_seed(100 * rows + cols)
    return newton_schulz(torch.randn(rows, cols, generator=generator, dtype=torch.float64), "svd")


@settings(deadline=None)
@given(SIZES, SIZES)
def test_match_rms_adamw_gives_entries_of_rms_one_fifth(rows, cols):
    update = SCALE_RULES["match_rms_adamw"](rows, cols) * orthogonal(rows, cols)
    assert update.square().mean().sqrt().item() == pytest.approx(0.2)


@settings(deadline=None)
@given(SIZES, SIZES)
def test_unit_update_rms_gives_entries_of_rms_one(rows, cols):
    update = SCALE_RULES["unit_update_rms"](rows, cols) * orthogonal(rows, cols)
    assert update.square().mean().sqrt().item() == pytest.approx(1.0)


@settings(deadline=None)
@given(SIZES, SIZES)
def test_spectral_gives_unit_rms_to_rms_operator_norm(rows, cols):
    """max over x of rms(U x) / rms(x) is sqrt(cols/rows) times the spectral norm."""
    update = SCALE_RULES["spectral"](rows, cols) * orthogonal(rows, cols)
    assert math.sqrt(cols / rows) * torch.linalg.matrix_norm(update, 2).item() == pytest.approx(1.0)


@settings(deadline=None)
@given(SIZES, SIZES)
def test_original_gives_spectral_norm_one_to_wide_and_more_to_tall_matrices(rows, cols):
    update = SCALE_RULES["original"](rows, cols) * orthogonal(rows, cols)
    wanted = 1.0 if rows <= cols else math.sqrt(rows / cols)
    assert torch.linalg.matrix_norm(update, 2).item() == pytest.approx(wanted)


def test_none_is_one():
    assert SCALE_RULES["none"](3, 7) == 1.0
