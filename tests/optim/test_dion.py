"""Dion against algorithm 1 of arXiv 2504.05295, in fp64, and what holds at full rank."""

import pytest
import torch
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.optim import CombinedOptimizer
from muonlab.optim.dion import DionSettings

LR, MU, DECAY, STEPS = 0.1, 0.9, 0.2, 5


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ours(shape, fraction, scale=1.0):
    W = nn.Parameter(draw(shape, 0))
    s = DionSettings(lr=LR, momentum=MU, weight_decay=DECAY, rank_fraction=fraction)
    optimizer = CombinedOptimizer([W], "dion", {"dion": s})
    for step in range(STEPS):
        W.grad = draw(shape, 100 + step) * scale
        optimizer.step()
    return W.detach(), optimizer.state[W]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_dion_is_algorithm_1_of_its_paper(shape, fraction):
    (rows, cols), r = shape, max(1, round(fraction * min(shape)))
    W, M = draw(shape, 0), torch.zeros(shape).double()
    Q = torch.randn((cols, r), generator=torch.Generator().manual_seed(0)).double()
    for step in range(STEPS):
        B = M + draw(shape, 100 + step)
        P = torch.linalg.qr(B @ Q)[0]
        R = B.T @ P
        M = B - (1 - MU) * P @ R.T
        Q = R / R.norm(dim=0)
        W = W - LR * DECAY * W - LR * (rows / cols) ** 0.5 * P @ Q.T
    weight, state = ours(shape, fraction)
    torch.testing.assert_close(weight, W, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state["momentum_buffer"], M, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state["basis_0"], Q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_gradients_unit_changes_nothing(scale):
    torch.testing.assert_close(ours((6, 4), 0.5, scale)[0], ours((6, 4), 0.5)[0], rtol=1e-9, atol=1e-9)


def test_each_matrix_of_a_stack_has_a_basis():
    stack = nn.Parameter(draw((3, 4, 6), 0))
    optimizer = CombinedOptimizer([stack], "dion")
    stack.grad = draw((3, 4, 6), 1)
    optimizer.step()
    assert optimizer.state[stack]["basis_0"].shape == (3, 6, 1)
    norms = torch.linalg.matrix_norm(optimizer.state[stack]["basis_0"])
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_basis_of_another_rank_is_refused():
    state = CombinedOptimizer([nn.Parameter(draw((6, 4), 0))], "dion")
    state.param_groups[0]["params"][0].grad = draw((6, 4), 1)
    state.step()
    saved = state.state_dict()
    saved["param_groups"][0]["rank_fraction"] = 1.0
    other = CombinedOptimizer([nn.Parameter(draw((6, 4), 0))], "dion")
    with pytest.raises(MuonlabError, match="basis_0 of"):
        other.load_state_dict(saved)
