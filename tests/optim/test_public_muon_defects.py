"""One regression test for every defect in public Muons, named after the code that has it.

The list with its measurements: torch 2.13, KellerJordan/Muon, optax, pytorch_optimizer, heavyball,
gram-newton-schulz and GAD-cell as of mid-2026.
"""

import pytest
import torch
from torch import nn

from muonlab.optim import Muon, build_optimizer, newton_schulz
from muonlab.optim.muon_rule import SCALE_RULES


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def matrix(*shape, scale=1.0, dtype=torch.float64):
    param = nn.Parameter(draw(*shape, dtype=dtype))
    param.grad = (draw(*shape, seed=1) * scale).to(dtype)
    return param


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("work", ["float32", "bfloat16"])
def test_torch_normalised_the_momentum_buffer_in_place_without_nesterov(nesterov, dtype, work):
    param = matrix(4, 6, dtype=dtype)
    optimizer = Muon([param], momentum=0.5, nesterov=nesterov, ns_dtype=work)
    optimizer.step()
    expected = 0.5 * param.grad.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(optimizer.state[param]["momentum_buffer"], expected)


def test_torch_shrank_updates_of_gradients_below_its_epsilon():
    """Gradients of scale 1e-12 gave singular values of 0.003 instead of about 1."""
    for scale in (1e-12, 1e-30):
        param = matrix(8, 8, scale=scale, dtype=torch.float32)
        before = param.detach().clone()
        Muon([param], lr=1.0, scale_rule="none", ns_schedule="you6").step()
        singular = torch.linalg.svdvals(before - param.detach())
        assert singular.median() > 0.9


def test_torch_documented_heavy_ball_and_ran_ema():
    for kind, share in (("ema", 0.1), ("heavy_ball", 1.0)):
        param = matrix(4, 6)
        optimizer = Muon([param], momentum=0.9, momentum_kind=kind)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], share * param.grad)


def test_keller_jordan_scaled_filters_by_the_size_of_their_kernel():
    """64 x 3 x 3 x 3 is 64 x 27, scale sqrt(64/27) = 1.54; the last two dimensions, 3 x 3, would give 1."""
    param = matrix(64, 3, 3, 3)
    before = param.detach().clone()
    Muon([param], lr=1.0, scale_rule="original", ns_schedule="svd", flatten=True, momentum=0.0).step()
    update = (before - param.detach()).flatten(1)
    assert torch.linalg.matrix_norm(update, 2).item() == pytest.approx((64 / 27) ** 0.5)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("kind", ["ema", "heavy_ball", "ema_corrected"])
def test_keller_jordan_overwrote_gradients(nesterov, kind):
    param = matrix(4, 6)
    before = param.grad.clone()
    optimizer = Muon(
        [param],
        nesterov=nesterov,
        momentum_kind=kind,
        weight_decay=0.1,
        before=["equilibrate_rows"],
        after=["renormalise", "normuon"],
        beta2=0.9,
    )
    optimizer.step()
    optimizer.step()
    assert torch.equal(param.grad, before)


def test_keller_jordan_took_missing_gradients_for_zeros_and_decayed():
    param = nn.Parameter(draw(4, 6))
    optimizer = Muon([param], lr=0.1, weight_decay=0.5)
    param.grad = draw(4, 6, seed=1)
    optimizer.step()
    before, buffer = param.detach().clone(), optimizer.state[param]["momentum_buffer"].clone()
    param.grad = None
    optimizer.step()
    assert torch.equal(param, before)
    assert torch.equal(optimizer.state[param]["momentum_buffer"], buffer)
    assert param.grad is None


def test_optax_mixed_two_bias_corrections_in_its_first_nesterov_directions():
    """`ema` is the plain look-ahead from the first step on; optax's directions are had by `ema_corrected`."""
    updates = {}
    for kind in ("ema", "ema_corrected", "heavy_ball"):
        param = matrix(6, 9)
        optimizer = Muon([param], lr=1.0, momentum_kind=kind, ns_schedule="svd", scale_rule="none")
        optimizer.step()
        before = param.detach().clone()
        param.grad = draw(6, 9, seed=2)
        optimizer.step()
        updates[kind] = before - param.detach()
    mu, first, second = 0.95, draw(6, 9, seed=1), draw(6, 9, seed=2)
    look_ahead = second + mu * (mu * first + second)
    torch.testing.assert_close(updates["ema"], newton_schulz(look_ahead, "svd"), rtol=0, atol=1e-10)
    torch.testing.assert_close(updates["ema"], updates["heavy_ball"], rtol=0, atol=1e-10)
    assert (updates["ema"] - updates["ema_corrected"]).abs().max() > 1e-3


def test_optax_ran_fewer_steps_than_asked_when_given_fewer_coefficients():
    rows = [(2.0, -1.5, 0.5), (1.875, -1.25, 0.375)]
    results = []
    for schedule, steps in ((rows, 4), ([*rows, rows[1], rows[1]], None)):
        param = matrix(4, 6)
        Muon([param], ns_schedule=schedule, ns_steps=steps).step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_pytorch_optimizer_had_the_two_scales_the_wrong_way_round():
    """What is called after AdamW's RMS gives it, and the default learning rate is of that unit."""
    param = matrix(30, 20)
    before = param.detach().clone()
    optimizer = Muon([param], lr=1.0, ns_schedule="svd")
    assert optimizer.param_groups[0]["scale_rule"] == "match_rms_adamw"
    optimizer.step()
    assert (before - param.detach()).square().mean().sqrt().item() == pytest.approx(0.2)
    assert SCALE_RULES["original"](30, 20) == pytest.approx((30 / 20) ** 0.5)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (2, 4, 9)])
@pytest.mark.parametrize("schedule", ["svd", "polar_express_1.01"])
def test_heavyball_ignored_the_chosen_iteration_for_rectangular_matrices(shape, schedule):
    param = matrix(*shape)
    before = param.detach().clone()
    Muon([param], lr=1.0, ns_schedule=schedule, scale_rule="none", momentum=0.0).step()
    expected = newton_schulz(param.grad, schedule)
    torch.testing.assert_close(before - param.detach(), expected, rtol=0, atol=1e-12)
    assert (expected - newton_schulz(param.grad, "jordan")).abs().max() > 1e-2


def test_gram_newton_schulz_never_called_what_it_had_compiled():
    """A compiled step is what runs: its graphs hold the matrix products."""
    products = []

    def backend(graph, inputs):
        products.extend(n for n in graph.graph.nodes if "bmm" in str(n.target) or "matmul" in str(n.target))
        return graph.forward

    param = matrix(4, 6)
    optimizer = Muon([param])
    torch.compiler.reset()  # a function that other tests compiled too often runs without
    optimizer.step = torch.compile(optimizer.step, backend=backend)
    optimizer.step()
    assert products


def test_gad_cell_multiplied_two_scales():
    """One rule at a time: 0.2 sqrt(max) without sqrt(max(1, rows/cols)) on top."""
    param = matrix(36, 4)
    before = param.detach().clone()
    Muon([param], lr=1.0, ns_schedule="svd").step()
    assert torch.linalg.matrix_norm(before - param.detach(), 2).item() == pytest.approx(0.2 * 6)


def test_gad_cell_sent_embeddings_and_heads_to_muon():
    model = nn.Sequential()
    model.add_module("wte", nn.Embedding(8, 4))
    model.add_module("hidden", nn.Linear(4, 4, bias=False))
    model.add_module("lm_head", nn.Linear(4, 8, bias=False))
    rules = {route.name: route.rule for route in build_optimizer("muon", model).routing}
    assert rules == {"wte.weight": "adamw", "hidden.weight": "muon", "lm_head.weight": "adamw"}
