"""Every stage round the iteration against its source's equation, written again here, in fp64 over whole steps.

The oracles orthogonalise by the SVD, and so do the optimizers under test, so that nothing but the stage differs.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.optim import Muon

MU, LR, STEPS = 0.9, 0.1, 5
SHAPES = [(6, 4), (4, 6), (5, 5)]


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(shape):
    return [draw(shape, 100 + step) * (1 + step) for step in range(STEPS)]


def svd_polar(X):
    """U Vᵀ over the directions that X has: a matrix of signs may lack some."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ torch.diag((1e-9 * S[0] < S).double()) @ Vh


def ours(shape, **stages):
    """The weight after STEPS steps; the direction is the average of the gradients."""
    W = nn.Parameter(draw(shape, 0))
    chain = {"momentum": MU, "nesterov": False, "ns_schedule": "svd", "scale_rule": "none", "lr": LR}
    optimizer = Muon([W], **{**chain, **stages})
    for g in gradients(shape):
        W.grad = g
        optimizer.step()
    return W.detach()


def close(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- before
@pytest.mark.parametrize("shape", SHAPES)
def test_muon2_divides_by_adams_root(shape):
    W, m, v = draw(shape, 0), torch.zeros(shape).double(), torch.zeros(shape).double()
    for g in gradients(shape):
        m = MU * m + (1 - MU) * g
        v = 0.95 * v + 0.05 * g * g
        W = W - LR * svd_polar(m / v.sqrt())
    close(ours(shape, before=["muon2"]), W)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0.3, 0.25])
def test_pmuon_whitens_by_powers_of_both_covariances(shape, gamma):
    def power(A):
        values, vectors = torch.linalg.eigh(A)
        floor = 1e-6 * values.mean()
        return vectors @ torch.diag(values.clamp_min(floor) ** -gamma) @ vectors.T

    (rows, cols), W, m = shape, draw(shape, 0), torch.zeros(shape).double()
    L, R = torch.zeros(rows, rows).double(), torch.zeros(cols, cols).double()
    for g in gradients(shape):
        m = MU * m + (1 - MU) * g
        L, R = 0.95 * L + g @ g.T, 0.95 * R + g.T @ g
        W = W - LR * svd_polar(power(L) @ m @ power(R))
    close(ours(shape, before=["pmuon"], gamma=gamma), W, 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_aurora_is_the_authors_iteration(shape):
    def balanced(G):
        rows, cols = G.shape
        if rows < cols:
            return balanced(G.T).T
        if rows == cols:
            return svd_polar(G)
        D = torch.diag(1 / G.norm(dim=1))
        D = D @ torch.diag((cols / rows / svd_polar(D @ G).pow(2).sum(1)).sqrt())
        return svd_polar(D @ G)

    W, m = draw(shape, 0), torch.zeros(shape).double()
    for g in gradients(shape):
        m = MU * m + (1 - MU) * g
        W = W - LR * balanced(m)
    close(ours(shape, before=["aurora"]), W)


def spread(rows):
    return (rows.max() / rows.min()).item()


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 1000))
def test_aurora_brings_the_rows_of_a_tall_update_nearer_to_one_norm(cols, extra, seed):
    G = draw((cols + extra + 4, cols), seed)

    def update(**stages):
        W = nn.Parameter(torch.zeros_like(G))
        optimizer = Muon([W], lr=1.0, nesterov=False, ns_schedule="svd", scale_rule="none", **stages)
        W.grad = G
        optimizer.step()
        return W.detach().norm(dim=1)

    assert spread(update(before=["aurora"])) < spread(update())


# ---------------------------------------------------------------- after
@pytest.mark.parametrize("shape", SHAPES)
def test_adamuon_is_algorithm_1_of_its_paper(shape):
    W, m, v = draw(shape, 0), torch.zeros(shape).double(), torch.zeros(shape).double()
    rows, cols = shape
    for g in gradients(shape):
        m = 0.95 * m + 0.05 * g
        O = svd_polar(m.sign())
        v = 0.95 * v + 0.05 * O * O
        O = O / (v.sqrt() + 1e-8)
        W = W - LR * (0.2 * math.sqrt(rows * cols) / O.norm() * O + 0.1 * W)
    chain = {"before": ["sign"], "after": ["adamuon"], "scale_rule": "match_rms_adamw", "momentum": 0.95}
    close(ours(shape, **chain, weight_decay=0.1), W)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_namo_is_algorithm_1_of_its_paper(shape, weight_decay):
    W, m, v = draw(shape, 0), torch.zeros(shape).double(), 0.0
    for t, g in enumerate(gradients(shape), start=1):
        m = MU * m + (1 - MU) * g
        v = 0.99 * v + 0.01 * g.norm() ** 2
        alpha = math.sqrt(1 - 0.99**t) / (1 - MU**t) * m.norm() / v.sqrt()
        W = W - LR * alpha * (svd_polar(m) + weight_decay * W)
    close(ours(shape, after=["namo"], weight_decay=weight_decay), W)


@pytest.mark.parametrize("shape", SHAPES)
def test_contra_muon_takes_off_a_share_of_the_momentum(shape):
    """Gradients with one leading direction, so that a power iteration finds the operator norm to the last digits."""
    W, m = nn.Parameter(draw(shape, 0)), torch.zeros(shape).double()
    expected = W.detach().clone()
    chain = {"momentum": MU, "nesterov": False, "ns_schedule": "svd", "scale_rule": "none"}
    optimizer = Muon([W], lr=LR, after=["contra"], **chain)
    leading = 30 * torch.outer(draw(shape[:1], 7), draw(shape[1:], 8))
    for g in gradients(shape):
        W.grad = g + leading
        optimizer.step()
        m = MU * m + (1 - MU) * (g + leading)
        O = svd_polar(m)
        pushed = O - 0.2 * m / torch.linalg.matrix_norm(m, ord=2)
        expected = expected - LR * pushed * O.norm() / pushed.norm()
    close(W.detach(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [-0.25, 0.0, 0.25, 1.0])
def test_a_spectral_power_keeps_the_vectors_and_shapes_the_values(shape, power):
    W, m = draw(shape, 0), torch.zeros(shape).double()
    for g in gradients(shape):
        m = MU * m + (1 - MU) * g
        U, S, Vh = torch.linalg.svd(m, full_matrices=False)
        shaped = U @ torch.diag(S**power) @ Vh
        W = W - LR * shaped / shaped.norm() * min(shape) ** 0.5
    close(ours(shape, after=["spectral_power"], power=power), W)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("stages", [
    {"before": ["muon2"]}, {"before": ["pmuon"]}, {"before": ["aurora"]}, {"before": ["sign"], "after": ["adamuon"]},
    {"after": ["namo"]}, {"after": ["contra"]}, {"after": ["spectral_power"]},
])  # fmt: skip
def test_the_gradients_unit_changes_nothing(stages, scale):
    """fp32, in which squares of both scales leave the range."""
    weights = []
    for unit in (1.0, scale):
        W = nn.Parameter(draw((6, 4), 0).float())
        optimizer = Muon([W], lr=LR, **stages)
        for g in gradients((6, 4)):
            W.grad = (g * unit).float()
            optimizer.step()
        weights.append(W.detach())
    close(*weights, tolerance=2e-4)


@pytest.mark.parametrize("stages", [
    {"before": ["muon2"]}, {"before": ["pmuon"]}, {"before": ["aurora"]}, {"before": ["sign"], "after": ["adamuon"]},
    {"after": ["namo"]}, {"after": ["contra"]}, {"after": ["spectral_power"]}, {"after": ["normuon"]},
])  # fmt: skip
def test_stages_leave_a_weight_without_gradient_alone(stages):
    W = nn.Parameter(draw((6, 4), 0).float())
    before, optimizer = W.detach().clone(), Muon([W], lr=LR, **stages)
    W.grad = torch.zeros_like(W)
    optimizer.step()
    assert torch.equal(W, before)


# ---------------------------------------------------------------- norms
@pytest.mark.parametrize("shape", SHAPES)
def test_hyperball_is_the_papers_equation(shape):
    def unit(X):
        return X / X.norm()

    W, m = draw(shape, 0), torch.zeros(shape).double()
    R = W.norm()
    for g in gradients(shape):
        m = MU * m + (1 - MU) * g
        W = R * unit(W - LR * R * unit(svd_polar(m)))
    close(ours(shape, update_norm="relative", weight_norm="fixed"), W)


def test_hyperball_brings_a_weight_back_that_something_else_has_shortened():
    W = nn.Parameter(draw((6, 4), 0))
    radius = W.norm().item()
    optimizer = Muon([W], lr=LR, update_norm="relative", weight_norm="fixed")
    for g in gradients((6, 4)):
        W.grad = g
        optimizer.step()
        with torch.no_grad():
            W.mul_(0.5)
    W.grad = g
    optimizer.step()
    assert W.norm().item() == pytest.approx(radius)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("floor", [None, 0.05, 2.0])
def test_short_updates_are_stretched_to_a_share_of_the_weight(shape, floor):
    W, m, share = draw(shape, 0), torch.zeros(shape).double(), 0.35 if floor is None else floor
    for g in gradients(shape):
        m = MU * m + (1 - MU) * g
        U = math.sqrt(max(1, shape[0] / shape[1])) * svd_polar(m)
        if U.norm() / W.norm() < share:
            U = U * share * W.norm() / U.norm()
        W = W - LR * (U + 0.1 * W)
    chain = {"update_norm": "floor", "scale_rule": "original", "weight_decay": 0.1}
    close(ours(shape, **chain, floor=floor), W)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outward", [None, 0.0, 1.0])
def test_a_brake_halves_the_growth_and_no_more(shape, outward):
    W, m, kept = draw(shape, 0) * 0.1, torch.zeros(shape).double(), 0.5 if outward is None else outward
    grown = set()
    param = nn.Parameter(W.clone())
    chain = {"momentum": MU, "nesterov": False, "ns_schedule": "svd", "scale_rule": "none"}
    optimizer = Muon([param], lr=LR, weight_norm="brake", outward=outward, **chain)
    for g in gradients(shape):
        m = MU * m + (1 - MU) * g
        stepped = W - LR * svd_polar(m)
        grown.add(bool(stepped.norm() > W.norm()))
        target = stepped.norm()
        if target > W.norm():
            target = W.norm() + kept * (target - W.norm())
        W = stepped * target / stepped.norm()
        param.grad = g
        optimizer.step()
    assert True in grown
    close(param.detach(), W)


def test_norms_are_of_each_matrix_of_a_stack_and_each_block():
    stack, heads = nn.Parameter(draw((3, 4, 6), 0)), nn.Parameter(draw((8, 6), 1))
    groups = [{"params": [stack]}, {"params": [heads], "row_blocks": 2}]
    before = stack.norm(dim=(1, 2)).tolist(), [half.norm().item() for half in heads.chunk(2)]
    optimizer = Muon(groups, lr=LR, update_norm="relative", weight_norm="fixed")
    for step in range(3):
        stack.grad, heads.grad = draw((3, 4, 6), step), draw((8, 6), step)
        optimizer.step()
    assert stack.norm(dim=(1, 2)).tolist() == pytest.approx(before[0])
    assert [half.norm().item() for half in heads.chunk(2)] == pytest.approx(before[1])


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(("stages", "message"), [
    ({"contra": 0.4}, "contra=0.4 is read by the stage 'contra' alone, which is not chosen"),
    ({"floor": 0.1, "update_norm": "relative"}, "floor=0.1 is read by the stage 'floor' alone"),
    ({"beta2": 0.9, "after": ["contra"]}, "by the stage 'muon2' or 'pmuon' or 'normuon' or 'adamuon' or 'namo' alone"),
    ({"after": ["normuon", "normuon"]}, r"after=\['normuon', 'normuon'\] names a stage twice"),
    ({"after": ["muon2"]}, "unknown after of a muon group 'muon2'"),
    ({"after": "normuon"}, "after of a muon group must be a list"),
    ({"weight_norm": "fixed", "weight_decay": 0.1}, "weight_decay must be 0, not 0.1"),
    ({"after": ["namo"], "momentum_kind": "heavy_ball"}, r"needs momentum_kind='ema' and before=\[\], not 'heavy_b"),
])  # fmt: skip
def test_what_no_stage_reads_and_what_contradicts_is_refused(stages, message):
    with pytest.raises(MuonlabError, match=message):
        Muon([nn.Parameter(draw((6, 4), 0))], **stages)


def test_a_weight_of_zeros_is_not_put_on_a_sphere_of_radius_zero():
    with pytest.raises(MuonlabError, match="begins as zeros"):
        Muon([("out", nn.Parameter(torch.zeros(6, 4)))], update_norm="relative", weight_norm="fixed")
