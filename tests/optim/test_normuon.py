"""The evening-out steps against what they promise, in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.optim.muon_rule import MuonRuleSettings
from muonlab.optim.muon_stages import equilibrate_rows, neurons_of, normuon, renormalise

SIZES = st.integers(1, 8)
NONE = MuonRuleSettings()


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@settings(deadline=None)
@given(SIZES, SIZES, SIZES)
def test_equilibrated_rows_have_one_norm_and_the_direction_of_each_row(stack, rows, cols):
    direction = draw(stack, rows, cols)
    evened = equilibrate_rows(NONE, direction, direction, {})
    norms = evened.norm(dim=-1)
    torch.testing.assert_close(norms, norms[:, :1].expand_as(norms), rtol=1e-12, atol=0)
    cosine = (evened * direction).sum(-1) / (norms * direction.norm(dim=-1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_equilibration_survives_extreme_and_zero_rows_in_fp32(scale):
    direction = (draw(4, 3) * scale).float()
    direction[1] = 0
    evened = equilibrate_rows(NONE, direction, direction, {})
    assert evened.isfinite().all()
    assert not evened[1].any()
    assert evened[0].any()


@settings(deadline=None)
@given(SIZES, SIZES, SIZES)
def test_renormalised_updates_have_the_norm_of_an_orthogonal_matrix(stack, rows, cols):
    update = draw(stack, rows, cols)
    norms = renormalise(NONE, update, update, update, {}).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, min(rows, cols) ** 0.5), rtol=1e-12, atol=0)


@settings(deadline=None)
@given(SIZES, SIZES, st.floats(0, 0.99))
def test_normalised_neurons_keep_the_norm_and_follow_the_running_mean_square(rows, cols, beta2):
    moment = draw(rows, cols).new_zeros(neurons_of((rows, cols)))
    along = -1 if rows >= cols else -2
    expected = torch.zeros_like(moment)
    given_beta2 = MuonRuleSettings(after=("normuon",), beta2=beta2)
    for seed in range(3):
        update = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = beta2 * expected + (1 - beta2) * update.pow(2).mean(along, keepdim=True)
        evened = normuon(given_beta2, update, update, update, {"second_moment": moment})
        torch.testing.assert_close(moment, expected, rtol=1e-9, atol=1e-12)
        assert evened.norm().item() == pytest.approx(update.norm().item())
        ratio = evened / update * expected.sqrt()
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-6, atol=0)
