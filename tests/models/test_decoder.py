"""What all decoders share: which draws of a seed make the weights."""

import math

import pytest
import torch
from torch import nn

from muonlab.models import build_model


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_a_seed_gives_the_weights_that_it_always_gave(activation):
    """Runs are repeated by their seed: the constructors' draws in order, then one normal draw a matrix."""
    torch.manual_seed(7)
    model = build_model("nanogpt", vocab_size=11, d_model=8, num_layers=2, activation=activation)
    torch.manual_seed(7)
    shapes = {"embedding.weight": (11, 8)}
    nn.Embedding(11, 8)
    for i in range(2):
        maps = {f"attention.{name}": (8, 8) for name in ("query", "key", "value", "output")}
        maps |= {"mlp.gate": (32, 8)} if activation == "swiglu" else {}
        maps |= {"mlp.up": (32, 8), "mlp.down": (8, 32)}
        for name, (rows, cols) in maps.items():
            nn.Linear(cols, rows, bias=False)
            shapes[f"blocks.{i}.{name}.weight"] = (rows, cols)
    nn.Linear(8, 11, bias=False)
    shapes["head.weight"] = (11, 8)
    weights = dict(model.named_parameters())
    assert {name for name, p in weights.items() if p.ndim == 2} == set(shapes)
    for name, shape in shapes.items():
        std = 0.6 / math.sqrt(shape[1])
        if name in ("embedding.weight", "head.weight"):
            std = 0.02
        elif name.endswith(("output.weight", "down.weight")):
            std /= math.sqrt(4)
        assert torch.equal(weights[name], torch.empty(shape).normal_(std=std)), name


def test_expert_stacks_start_like_matrices():
    torch.manual_seed(0)
    layer = build_model("moe", d_model=64, num_layers=2, expert_hidden=32).blocks[1].mlp
    assert layer.experts.gate.std().item() == pytest.approx(0.6 / 8, rel=0.02)
    assert layer.experts.up.std().item() == pytest.approx(0.6 / 8, rel=0.02)
    assert layer.experts.down.std().item() == pytest.approx(0.6 / math.sqrt(32) / 2, rel=0.02)
    assert layer.router.weight.std().item() == pytest.approx(0.6 / 8, rel=0.1)
