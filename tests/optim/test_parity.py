"""parity(name) against fp64 transcriptions of the published equations, and against PyTorch's own Muon."""

import pytest
import torch
from muon_oracles import PUBLISHED

from muonlab.errors import MuonlabError
from muonlab.optim import Muon
from muonlab.optim.parity import convert_lr, list_parities, parity

SHAPES = [(6, 6), (5, 9), (9, 5), (1, 4), (12, 3)]


def matrices(shape, steps, scale=1e4, dtype=torch.float64):
    """A weight and gradients, so large that the sources' epsilons (1e-6 and less) are beneath notice."""
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    draw = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(steps + 1)]
    return draw[0], [scale * g for g in draw[1:]]


def train(weight, grads, optimizer_of):
    param = torch.nn.Parameter(weight.clone())
    optimizer = optimizer_of([param])
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def test_every_parity_has_its_equations_here():
    assert list_parities() == sorted(PUBLISHED)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parity_equals_the_published_equations(name, shape):
    weight, grads = matrices(shape, steps=6)
    ours = train(weight, grads, lambda p: Muon(p, lr=0.05, **parity(name)))
    theirs = PUBLISHED[name](weight, grads, 0.05)
    assert (theirs - weight).abs().max() > 1e-2  # else nothing would be compared
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_no_parity_is_another_ones(name):
    """The comparison above can tell the implementations apart."""
    weight, grads = matrices((9, 5), steps=6)
    ours = train(weight, grads, lambda p: Muon(p, lr=0.05, **parity(name)))
    same = [
        other for other, run in PUBLISHED.items() if torch.allclose(run(weight, grads, 0.05), ours, atol=1e-4)
    ]
    assert name in same
    assert set(same) <= ({name, "keller_jordan", "pytorch_optimizer"} if name != "torch" else {"torch"})


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_with_torch_optim_muon_in_fp64(monkeypatch, shape, nesterov, adjust):
    """torch always iterates in bf16; with that one cast taken away it is the same optimizer."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    weight, grads = matrices(shape, steps=6)
    theirs = train(
        weight, grads, lambda p: torch.optim.Muon(p, lr=0.05, nesterov=nesterov, adjust_lr_fn=adjust)
    )
    settings = {**parity("torch"), "nesterov": nesterov, "scale_rule": adjust}
    ours = train(weight, grads, lambda p: Muon(p, lr=0.05, **settings))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(32, 32), (48, 24), (24, 48)], ids=str)
def test_parity_with_torch_optim_muon_in_its_bf16(shape):
    """As both run, each within bf16's rounding of the exact update: both are 1.2 to 1.6 % of its norm away."""
    weight, grads = matrices(shape, steps=1, dtype=torch.float32)
    settings = {**parity("torch"), "weight_decay": 0.0, "ns_dtype": "bfloat16"}
    exact = PUBLISHED["torch"](weight.double(), [g.double() for g in grads], 1.0, wd=0.0) - weight
    for update in (
        train(weight, grads, lambda p: Muon(p, lr=1.0, **settings)) - weight,
        train(weight, grads, lambda p: torch.optim.Muon(p, lr=1.0, weight_decay=0.0)) - weight,
    ):
        assert (update - exact).norm() < 0.025 * exact.norm()


def test_convert_lr_moves_a_matrix_as_far():
    shape = (12, 3)
    weight, grads = matrices(shape, steps=1)
    lr = convert_lr(0.05, "keller_jordan", "moonlight", shape)
    theirs = PUBLISHED["keller_jordan"](weight, grads, 0.05, wd=0.0)
    assert lr == pytest.approx(0.05 * 2 / (0.2 * 12**0.5))
    torch.testing.assert_close(PUBLISHED["moonlight"](weight, grads, lr, wd=0.0), theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convert_lr_there_and_back(shape):
    for name in [*list_parities(), "none", "spectral"]:
        assert convert_lr(convert_lr(0.02, "torch", name, shape), name, "torch", shape) == pytest.approx(0.02)


def test_unknown_implementation_and_shape_are_refused():
    with pytest.raises(MuonlabError, match="did you mean 'moonlight'"):
        parity("moonligt")
    with pytest.raises(MuonlabError, match="unknown implementation or scale rule 'adam'"):
        convert_lr(0.1, "torch", "adam", (3, 3))
    with pytest.raises(MuonlabError, match="shape of a matrix"):
        convert_lr(0.1, "torch", "dion", (3,))
