"""What the README tells a reader to type."""

import re
from pathlib import Path

import pytest
import torch

from muonlab.models import build_model
from muonlab.optim import build_optimizer
from muonlab.optim.registry import OPTIMIZERS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_optimizer_that_the_readme_adds_trains():
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "register_optimizer" in block
    ]
    exec(code, {})
    try:
        torch.manual_seed(0)
        model = build_model("nanogpt", vocab_size=16, context=8, d_model=16, num_layers=1)
        optimizer = build_optimizer("slowmuon", model, lr=0.02)
        tokens = torch.arange(64).reshape(8, 8) % 16
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(tokens, (tokens + 1) % 16).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.5
    finally:
        OPTIMIZERS._builders.pop("slowmuon")


def test_every_path_that_the_readme_links_to_exists():
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) >= 4
    missing = [link for link in links if not (root / link).exists()]
    assert not missing


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_every_make_target_of_the_readme_exists(target):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.M)
