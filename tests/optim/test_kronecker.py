"""SOAP, SOAP-Muon, Shampoo and KL-Shampoo against their papers' equations in fp64, a matrix at a time in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from muonlab.optim import SOAP, KLShampoo, Shampoo, SOAPMuon, build_optimizer
from muonlab.optim.kronecker import eigenvectors, power_step

STEPS, LR = 8, 0.1


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(optimizer, param, steps=STEPS):
    for step in range(steps):
        param.grad = draw(*param.shape, seed=20 + step)
        optimizer.step()
    return param.detach()


def soap_directions(grads, b1, b2, eps, frequency):
    """Algorithm 3, with the authors' first step and bias correction; one direction a gradient."""
    L, R = ((1 - b2) * x for x in (grads[0] @ grads[0].T, grads[0].T @ grads[0]))
    QL, QR = (np.linalg.eigh(x)[1][:, ::-1] for x in (L, R))
    M, V = np.zeros_like(grads[0]), np.zeros_like(grads[0])
    for t, G in enumerate(grads[1:], 1):
        M = b1 * M + (1 - b1) * G
        rotated = QL.T @ G @ QR
        V = b2 * V + (1 - b2) * rotated**2
        N = (QL.T @ M @ QR / (1 - b1**t)) / ((np.sqrt(V) + eps) / np.sqrt(1 - b2**t))
        yield QL @ N @ QR.T
        L, R = b2 * L + (1 - b2) * G @ G.T, b2 * R + (1 - b2) * G.T @ G
        if t % frequency == 0:
            left, right = (np.argsort(-np.diag(Q.T @ C @ Q)) for C, Q in ((L, QL), (R, QR)))
            V = V[left][:, right]
            QL, QR = np.linalg.qr(L @ QL[:, left])[0], np.linalg.qr(R @ QR[:, right])[0]


def shampoo_directions(grads, b1, b2, eps, frequency):
    """Algorithm 1, by the singular values of the covariances; b2 = 1 is its sum."""
    M, L, R = 0.0, 0.0, 0.0
    for t, G in enumerate(grads, 1):
        M = b1 * M + (1 - b1) * G
        share, correction = (1.0, 1.0) if b2 == 1 else (1 - b2, 1 - b2**t)
        L, R = b2 * L + share * G @ G.T, b2 * R + share * G.T @ G
        if (t - 1) % frequency == 0:
            roots = []
            for C in (L / correction, R / correction):
                U, S, _ = np.linalg.svd(C)
                roots.append(U @ np.diag((S + eps) ** -0.25) @ U.T)
        yield roots[0] @ (M / (1 - b1**t)) @ roots[1]


def kl_shampoo_directions(grads, b1, b2, eps, frequency, initial):
    """The equations with explicit inverses of the covariances' factors; clamped as in the authors' code."""
    rows, cols = grads[0].shape
    L, R = (1 - b2) * grads[0] @ grads[0].T / cols, (1 - b2) * grads[0].T @ grads[0] / rows
    QL, QR = (np.linalg.eigh(x)[1][:, ::-1] for x in (L, R))
    l, r, M = np.full(rows, initial), np.full(cols, initial), 0.0
    for t, G in enumerate(grads[1:], 1):
        M = b1 * M + (1 - b1) * G
        root = np.sqrt(np.outer(l, r))
        yield QL @ (QL.T @ M @ QR / (root + eps)) @ QR.T
        inverse_L, inverse_R = QL @ np.diag(1 / l) @ QL.T, QR @ np.diag(1 / r) @ QR.T
        by_R, by_L = G @ inverse_R @ G.T / cols, G.T @ inverse_L @ G / rows
        L, R = b2 * L + (1 - b2) * by_R, b2 * R + (1 - b2) * by_L
        new_l = b2 * l + (1 - b2) * np.diag(QL.T @ by_R @ QL)
        new_r = b2 * r + (1 - b2) * np.diag(QR.T @ by_L @ QR)
        l, r = np.maximum(new_l, 1 / 10**2), np.maximum(new_r, 1 / 10**2)
        if t % frequency == 0:
            QL, QR = np.linalg.qr(L @ QL)[0], np.linalg.qr(R @ QR)[0]


CASES = {
    "soap": (SOAP, soap_directions, {"betas": (0.9, 0.8), "eps": 1e-3, "frequency": 2}, {}),
    "soap every step": (SOAP, soap_directions, {"betas": (0.0, 0.95), "eps": 1e-8, "frequency": 1}, {}),
    "shampoo": (Shampoo, shampoo_directions, {"betas": (0.9, 1.0), "eps": 1e-12, "frequency": 1}, {}),
    "shampoo average": (Shampoo, shampoo_directions, {"betas": (0.5, 0.9), "eps": 0.1, "frequency": 3}, {}),
    "kl_shampoo": (
        KLShampoo,
        kl_shampoo_directions,
        {"betas": (0.9, 0.8), "eps": 1e-3, "frequency": 2},
        {"initial": 0.3},
    ),
}


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_the_paper(case, decay):
    make, oracle, settings, more = CASES[case]
    W = draw(5, 5, seed=0)
    param = nn.Parameter(W.clone())
    optimizer = make([param], lr=LR, weight_decay=decay, **settings, **more)
    result = trained(optimizer, param)
    grads = [draw(5, 5, seed=20 + step).numpy() for step in range(STEPS)]
    W = W.numpy()
    (b1, b2), eps, frequency = settings["betas"], settings["eps"], settings["frequency"]
    directions = list(oracle(grads, b1, b2, eps, frequency, *more.values()))
    for D in directions:
        W = (1 - LR * decay) * W - LR * D
    assert len(directions) == STEPS - (make is not Shampoo)
    np.testing.assert_allclose(result.numpy(), W, rtol=0, atol=1e-9)


def test_soap_muon_is_the_polar_factor_of_soaps_update():
    """Singular values of Newton-Schulz' five steps are within 0.7 and 1.2; singular vectors are SOAP's."""
    grads = [draw(5, 5, seed=20 + step).numpy() for step in range(3)]
    *_, D = soap_directions(grads, 0.95, 0.95, 1e-8, 10)
    param = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
    optimizer = SOAPMuon([param], lr=LR, weight_decay=0.0)
    trained(optimizer, param, steps=2)
    before = param.detach().clone()
    param.grad = torch.from_numpy(grads[2])
    optimizer.step()
    update = (before - param.detach()).numpy() / (LR * 0.2 * 5**0.5)
    U, S, Vt = np.linalg.svd(D)
    core = U.T @ update @ Vt.T
    kept = 0.1 * S[0] < S
    assert kept.sum() >= 3
    assert (np.diag(core)[kept] > 0.65).all()
    assert (np.diag(core) < 1.25).all()
    np.testing.assert_allclose(core - np.diag(np.diag(core)), 0, atol=1e-4)


def test_shampoos_first_step_is_the_polar_factor():
    """(G Gᵀ)^(-1/4) G (Gᵀ G)^(-1/4) = U Vᵀ: where Muon comes from."""
    G = draw(4, 6, seed=1)
    param = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = Shampoo([param], lr=1.0, betas=(0.0, 1.0), eps=1e-30)
    param.grad = G
    optimizer.step()
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(-param.detach(), U @ Vt, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [SOAP, SOAPMuon, Shampoo, KLShampoo])
def test_stacks_heads_and_transposes_are_matrices_by_themselves(make):
    """A stack of experts, and the heads of a query, move as each would alone."""
    stack, heads = nn.Parameter(draw(3, 4, 6, seed=0)), nn.Parameter(draw(12, 6, seed=0))
    alone = [nn.Parameter(each.clone()) for each in draw(3, 4, 6, seed=0)]
    with torch.no_grad():
        heads.copy_(stack.reshape(12, 6))
    optimizer = make([{"params": [stack]}, {"params": [heads], "row_blocks": 3}], lr=LR)
    others = make(alone, lr=LR)
    for step in range(4):
        G = draw(3, 4, 6, seed=30 + step)
        stack.grad, heads.grad = G, G.reshape(12, 6)
        for param, grad in zip(alone, G, strict=True):
            param.grad = grad
        optimizer.step()
        others.step()
    expected = torch.stack([p.detach() for p in alone])
    torch.testing.assert_close(stack.detach(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(heads.detach(), expected.reshape(12, 6), rtol=0, atol=1e-7)


def test_a_power_step_keeps_the_basis_orthonormal_and_finds_the_eigenvectors():
    A = draw(2, 6, 6, seed=0)
    C = A @ A.mT
    Q = torch.eye(6, dtype=torch.float64).expand(2, 6, 6).clone()
    for _ in range(3000):
        power_step(C, Q)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(6, dtype=torch.float64).expand(2, 6, 6))
    between = (eigenvectors(C).mT @ Q).abs()
    torch.testing.assert_close(between, torch.eye(6, dtype=torch.float64).expand(2, 6, 6), rtol=0, atol=1e-6)


def test_a_gradient_that_is_no_number_shows_in_the_weights_and_raises_nothing():
    for name in ("soap", "soap_muon", "shampoo", "kl_shampoo"):
        model = nn.Linear(4, 4, bias=False)
        optimizer = build_optimizer(name, model)
        for value in (1.0, 1.0, torch.nan, 1.0):
            model.weight.grad = torch.full((4, 4), value)
            optimizer.step()
        assert model.weight.isnan().all(), name
