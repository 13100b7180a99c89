"""Muown against the equations of arXiv 2605.10797 and its authors' code, in fp64."""

import pytest
import torch
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.optim import CombinedOptimizer
from muonlab.optim.muown import MuownSettings

LR, MU, STEPS = 0.05, 0.9, 6


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(W, **settings):
    s = MuownSettings(lr=LR, momentum=MU, ns_schedule="svd", **settings)
    return CombinedOptimizer([W], "muown", {"muown": s})


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muown_is_the_authors_update(shape, decay):
    W = draw(shape, 0)
    g, n = W.norm(dim=1, keepdim=True), W.norm(dim=1, keepdim=True)
    m, first, second = torch.zeros(shape).double(), torch.zeros_like(g), torch.zeros_like(g)
    param = nn.Parameter(W.clone())
    optimizer = made(param, weight_decay=decay)
    for t in range(1, STEPS + 1):
        G = draw(shape, 100 + t)
        V = W / g * n
        u = V / n
        dg = (G * u).sum(1, keepdim=True)
        dV = g / n * (G - u * dg)
        m = MU * m + dV
        U, _, Vh = torch.linalg.svd(dV + MU * m, full_matrices=False)
        V = V - LR * 0.2 * max(shape) ** 0.5 * U @ Vh
        first, second = 0.9 * first + 0.1 * dg, 0.95 * second + 0.05 * dg * dg
        g = g - LR * (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        n = V.norm(dim=1, keepdim=True)
        W = g * V / n - LR * decay * W
        g = W.norm(dim=1, keepdim=True) if decay else g
        param.grad = G
        optimizer.step()
    torch.testing.assert_close(param.detach(), W, rtol=1e-6, atol=1e-6)


def test_a_row_that_a_clip_has_shortened_stays_short():
    W = nn.Parameter(draw((6, 4), 0))
    optimizer = made(W)
    W.grad = draw((6, 4), 1)
    optimizer.step()
    with torch.no_grad():
        W[2] *= 0.25
    short, other = W[2].norm().item(), W[3].norm().item()
    W.grad = draw((6, 4), 2)
    optimizer.step()
    assert W[2].norm().item() == pytest.approx(short, abs=2 * LR)
    assert W[3].norm().item() == pytest.approx(other, abs=2 * LR)


def test_what_muown_has_no_use_for_is_refused():
    with pytest.raises(MuonlabError, match="so weight_norm must be 'free', not 'brake'"):
        made(nn.Parameter(draw((6, 4), 0)), weight_norm="brake")
    zeros = draw((6, 4), 0)
    zeros[1] = 0
    with pytest.raises(MuonlabError, match="has a row of zeros"):
        made(nn.Parameter(zeros))
