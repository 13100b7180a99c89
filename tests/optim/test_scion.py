"""Scion against the linear minimisation oracles of the paper in fp64."""

import pytest
import torch
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.optim import Scion, build_optimizer
from muonlab.optim.scion import rows, sign

LR, MU, STEPS = 0.01, 0.9, 4


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def newton_schulz(G):
    """Jordan's five steps, as in the authors' code, in fp64."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / X.norm()
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


def spectral(M):
    return (M.shape[0] / M.shape[1]) ** 0.5 * newton_schulz(M)


def by_rows(M):
    return M / M.square().mean(-1, keepdim=True).sqrt()


def by_signs(M):
    return torch.sign(M) / M.shape[-1]


@pytest.mark.parametrize("decay", [1.0, 0.0], ids=["constrained", "unconstrained"])
@pytest.mark.parametrize(
    ("shape", "group", "lmo"),
    [
        ((6, 4), {"radius": 50.0}, spectral),
        ((4, 6), {"radius": 2.0}, spectral),
        ((6, 4), {"rule": "scion_table", "norm": "rows", "radius": 3.0}, by_rows),
        ((5,), {"rule": "scion_table", "norm": "rows", "radius": 3.0}, by_rows),
        ((6, 4), {"rule": "scion_table"}, by_signs),
    ],
)
def test_updates_are_those_of_algorithm_1(shape, group, lmo, decay):
    W = draw(*shape, seed=0)
    param = nn.Parameter(W.clone())
    optimizer = Scion([{"params": [param], **group}], lr=LR, momentum=MU, weight_decay=decay)
    radius = group.get("radius", 3000.0)
    M = 0 * W
    for step in range(STEPS):
        G = draw(*shape, seed=7 + step)
        param.grad = G
        optimizer.step()
        M = MU * M + (1 - MU) * G
        W = (1 - decay * LR) * W - LR * radius * lmo(M)
    # Newton-Schulz is fp32 on a CPU, as for Muon.
    torch.testing.assert_close(param.detach(), W, rtol=1e-5, atol=1e-5 * radius * LR)


def test_constrained_weights_enter_their_balls_and_stay():
    """From far outside, each norm falls to its radius: the RMS of rows, and the largest entry times the columns."""
    table, head = (nn.Parameter(100 * draw(5, 4, seed=i)) for i in range(2))
    groups = [
        {"params": [table], "rule": "scion_table", "norm": "rows", "radius": 2.0},
        {"params": [head], "rule": "scion_table", "norm": "sign", "radius": 3.0},
    ]
    optimizer = Scion(groups, lr=0.1)
    for step in range(200):
        for i, param in enumerate((table, head)):
            param.grad = draw(5, 4, seed=1000 + 2 * step + i)
        optimizer.step()
    assert table.square().mean(-1).sqrt().max() <= 2.0 * (1 + 1e-6)
    assert 4 * head.abs().max() <= 3.0 * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_oracles_have_no_scale_and_leave_zeros(scale):
    M = draw(3, 4, seed=0).float()
    M[1] = 0
    torch.testing.assert_close(rows(scale * M, M), rows(M, M))
    assert torch.equal(sign(scale * M, M), sign(M, M))
    assert (rows(M, M)[1] == 0).all()
    assert (sign(M, M)[1] == 0).all()


def test_a_whole_model_goes_under_the_norm_of_each_role():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model.lm_head = nn.Linear(4, 8)
    optimizer = build_optimizer("scion", model, radius=7.0, lr=0.5)
    under = {g["name"]: (g["rule"], g.get("norm"), g["radius"]) for g in optimizer.param_groups}
    assert under == {
        "embedding": ("scion_table", "rows", 50.0),
        "linear": ("scion", None, 7.0),
        "bias": ("scion_table", "rows", 50.0),
        "norm": ("scion_table", "rows", 50.0),
        "head": ("scion_table", "sign", 3000.0),
    }
    assert {g["lr"] for g in optimizer.param_groups} == {0.5}
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups if g["weight_decay"]} == {
        "embedding": 1.0,
        "linear": 1.0,
        "head": 1.0,
    }


def test_a_filter_is_no_table():
    with pytest.raises(MuonlabError, match="scion_table takes tables of rows and vectors, not"):
        Scion([{"params": [nn.Parameter(torch.zeros(2, 3, 3))], "rule": "scion_table"}])
