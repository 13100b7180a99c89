"""A cadence of exact max logits changes what is stored, and nothing that the clip does."""

import numpy as np
import pytest
import torch

from muonlab.record import load_run
from muonlab.train.run import train

LARGE = ["model.qk_init_scale=8"]  # logits of 60 to 120, where ln(context) is little


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Short contexts on a CPU run explicit attention, whose maxima are always exact; here none does."""
    monkeypatch.setattr("muonlab.models.attention.EXPLICIT_CONTEXT", 0)


def heads_and_weights(folder):
    checkpoint = torch.load(sorted((folder / "checkpoints").iterdir())[-1], weights_only=True)
    return load_run(folder).max_logits, checkpoint["state_dict"]


@pytest.mark.parametrize(("maximum", "tau"), [("signed", 75), ("absolute", 90)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_clip_decides_the_same_at_any_cadence(tiny, maximum, tau, accumulate):
    clip = [f"optimizer.maximum={maximum}", f"optimizer.tau={tau}"]
    settings = [*LARGE, *clip, f"trainer.accumulate={accumulate}"]
    every, fifth = (
        heads_and_weights(train(tiny(*settings, f"trainer.exact_every={n}")).folder) for n in (1, 5)
    )
    (exact, weights), (bounded, same) = every, fifth
    assert exact["exact"].all()
    assert (exact["gamma"] == bounded["gamma"]).all()
    for name, value in weights.items():
        assert torch.equal(value, same[name]), name
    known, clipped = bounded["exact"], bounded["gamma"] < 1
    assert known[bounded["step"] % 5 == 0].all()
    assert clipped.any()
    column = "value" if maximum == "signed" else "value_abs"
    assert (bounded.loc[clipped, column] == exact.loc[clipped, column]).all()
    # The bound of a magnitude is so loose that with these weights every head is suspect.
    assert known.all() == (maximum == "absolute")
    if accumulate == 1:
        assert known[clipped].all()
    for column in ("value", "value_abs"):
        assert (bounded.loc[known, column] == exact.loc[known, column]).all()
        assert (bounded.loc[~known, column] >= exact.loc[~known, column]).all()
    # The log-sum-exp of 16 keys, not the far looser product of norms.
    assert (bounded.loc[~known, "value"] < exact.loc[~known, "value"] + np.log(16) + 0.01).all()


def test_without_a_clip_no_exact_pass_is_made_in_between(tiny, monkeypatch):
    from muonlab.models import max_logits

    passes = []
    measure = max_logits.logit_range
    monkeypatch.setattr(max_logits, "logit_range", lambda *given: passes.append(1) or measure(*given))
    heads = load_run(train(tiny("optimizer=muon", "trainer.exact_every=5")).folder).max_logits
    assert len(passes) == 3 * 2  # steps 0, 5, 10; two layers
    assert sorted(heads.loc[heads["exact"], "step"].unique()) == [0, 5, 10]


def test_explicit_attention_is_exact_at_every_step(tiny, monkeypatch):
    monkeypatch.setattr("muonlab.models.attention.EXPLICIT_CONTEXT", 128)
    every, fifth = (load_run(train(tiny(f"trainer.exact_every={n}")).folder).max_logits for n in (1, 5))
    assert fifth["exact"].all()
    assert (every["value"] == fifth["value"]).all()
