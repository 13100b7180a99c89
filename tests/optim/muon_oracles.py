"""Published Muon equations, transcribed plainly in fp64: one matrix, a list of gradients in, the weights out.

Nothing here is shared with muonlab.optim, not even the coefficients. Each keeps its source's epsilon.
"""

import math

import torch
from torch import Tensor

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
YOU = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
POLAR_EXPRESS_102 = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
POLAR_EXPRESS_105 = [
    (a / 1.05, b / 1.05**3, c / 1.05**5)
    for a, b, c in [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ]
]


def iterate(X: Tensor, rows: list[tuple[float, float, float]]) -> Tensor:
    """p(X) = a X + b (X X^T) X + c (X X^T)^2 X for every row, by singular values."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    for a, b, c in rows:
        S = a * S + b * S**3 + c * S**5
    return (U * S) @ Vh


def torch_muon(W, grads, lr, mu=0.95, wd=0.1):
    """torch.optim.Muon 2.13: EMA, Nesterov, norm clamped at 1e-7, decay by the unscaled lr."""
    W, m = W.clone(), torch.zeros_like(W)
    for g in grads:
        m = mu * m + (1 - mu) * g
        d = (1 - mu) * g + mu * m
        O = iterate(d / max(d.norm().item(), 1e-7), JORDAN)
        W = W - lr * wd * W - lr * math.sqrt(max(1, W.shape[0] / W.shape[1])) * O
    return W


def keller_jordan(W, grads, lr, mu=0.95, wd=0.0):
    """KellerJordan/Muon: the same with the norm plus 1e-7."""
    W, m = W.clone(), torch.zeros_like(W)
    for g in grads:
        m = mu * m + (1 - mu) * g
        d = (1 - mu) * g + mu * m
        O = iterate(d / (d.norm() + 1e-7), JORDAN)
        W = W * (1 - lr * wd) - lr * max(1, W.shape[0] / W.shape[1]) ** 0.5 * O
    return W


def moonlight(W, grads, lr, mu=0.95, wd=0.1):
    """Moonlight, arXiv 2502.16982: heavy ball, Nesterov, 0.2 sqrt(max)."""
    W, m = W.clone(), torch.zeros_like(W)
    for g in grads:
        m = mu * m + g
        d = g + mu * m
        O = iterate(d / (d.norm() + 1e-7), JORDAN)
        W = W * (1 - lr * wd) - lr * 0.2 * math.sqrt(max(W.shape)) * O
    return W


def dion(W, grads, lr, mu=0.95, wd=0.01):
    """microsoft/dion's Muon: heavy ball without look-ahead, norm times 1.02, sqrt(out/in)."""
    W, m = W.clone(), torch.zeros_like(W)
    for g in grads:
        m = mu * m + g
        O = iterate(m / (1.02 * m.norm() + 1e-8), POLAR_EXPRESS_102)
        W = W * (1 - lr * wd) - lr * math.sqrt(W.shape[0] / W.shape[1]) * O
    return W


def emerging_optimizers(W, grads, lr, mu=0.95, wd=0.01):
    """NVIDIA Emerging-Optimizers' Muon: decay before the momentum, EMA without look-ahead, sqrt(max)."""
    W, m = W.clone(), torch.zeros_like(W)
    for g in grads:
        W = W - lr * wd * W
        m = mu * m + (1 - mu) * g
        W = W - lr * math.sqrt(max(W.shape)) * iterate(m / max(m.norm().item(), 1e-15), YOU)
    return W


def optax_muon(W, grads, lr, mu=0.95, wd=0.0):
    """optax.contrib.muon: mu_hat under Nesterov mixes the corrections of this step and the next."""
    W, m = W.clone(), torch.zeros_like(W)
    for t, g in enumerate(grads, start=1):
        m = mu * m + (1 - mu) * g
        d = mu * m / (1 - mu ** (t + 1)) + (1 - mu) * g / (1 - mu**t)
        O = iterate(d / (d.norm() + 1e-8), JORDAN)
        W = W - lr * (math.sqrt(max(1, W.shape[0] / W.shape[1])) * O + wd * W)
    return W


def gram_newton_schulz(W, grads, lr, mu=0.95, wd=0.1):
    """Dao-AILab/gram-newton-schulz's Muon, without its bf16 and fp16 roundings."""
    W, m = W.clone(), torch.zeros_like(W)
    for g in grads:
        m = mu * m + g
        d = g + mu * m
        O = iterate(d / (d.norm() + 1e-7), POLAR_EXPRESS_105)
        W = W * (1 - lr * wd) - 0.2 * lr * math.sqrt(max(W.shape)) * O
    return W


def nanochat(W, grads, lr, mu=0.95, wd=0.28, beta2=0.9):
    """nanochat's MuonAdamW: MuonEq rows, 1.01 times the norm, Muon+ norm, NorMuon, cautious decay."""
    rows, cols = W.shape
    along = 1 if rows >= cols else 0
    W, m = W.clone(), torch.zeros_like(W)
    s = torch.zeros(W.shape[1 - along], dtype=W.dtype)
    eta = lr * max(1.0, rows / cols) ** 0.5
    for g in grads:
        m = mu * m + (1 - mu) * g
        X = (1 - mu) * g + mu * m
        row_norms = (X * X).sum(1).sqrt()
        X = torch.diag((X.norm() / rows**0.5) / row_norms.clamp_min(1e-6)) @ X
        O = iterate(X / (1.01 * X.norm() + 1e-6), POLAR_EXPRESS_102)
        O = O * min(rows, cols) ** 0.5 / O.norm()
        s = beta2 * s + (1 - beta2) * (O * O).mean(along)
        evened = O / s.sqrt().unsqueeze(along)
        O = evened * (O.norm() / evened.norm())
        W = W - eta * O - eta * wd * torch.where(O * W >= 0, W, 0.0)
    return W


def heavyball(W, grads, lr, mu=0.9, wd=0.0):
    """heavyball's Muon with heavyball_momentum=True."""
    W, m = W.clone(), torch.zeros_like(W)
    for g in grads:
        m = mu * m + g
        d = g + mu * m
        O = iterate(d / max(d.norm().item(), 1e-7), YOU)
        W = W * (1 - lr * wd) - lr * max(1, W.shape[0] / W.shape[1]) ** 0.5 * O
    return W


def muon_fsdp2(W, grads, lr, mu=0.95, wd=0.0):
    """muon_fsdp2 0.3: Keller Jordan's with Moonlight's scale."""
    W, m = W.clone(), torch.zeros_like(W)
    for g in grads:
        m = mu * m + (1 - mu) * g
        d = (1 - mu) * g + mu * m
        O = iterate(d / (d.norm() + 1e-7), JORDAN)
        W = W * (1 - lr * wd) - 0.2 * lr * math.sqrt(max(W.shape)) * O
    return W


def muonium(W, grads, lr, mu=0.95, wd=0.1):
    """muonium 0.2: heavy ball, cautious decay inside the shape-scaled update."""
    W, m = W.clone(), torch.zeros_like(W)
    for g in grads:
        m = mu * m + g
        d = g + mu * m
        O = iterate(d / (1.02 * d.norm() + 1e-7), POLAR_EXPRESS_102)
        O = O + wd * W * (O * W > 0)
        W = W - lr * math.sqrt(max(1, W.shape[0] / W.shape[1])) * O
    return W


PUBLISHED = {
    "torch": torch_muon,
    "keller_jordan": keller_jordan,
    "pytorch_optimizer": keller_jordan,
    "moonlight": moonlight,
    "dion": dion,
    "emerging_optimizers": emerging_optimizers,
    "optax": optax_muon,
    "gram_newton_schulz": gram_newton_schulz,
    "nanochat": nanochat,
    "heavyball": heavyball,
    "muon_fsdp2": muon_fsdp2,
    "muonium": muonium,
}
