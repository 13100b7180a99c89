"""Spectra of a real run: what the columns hold, and that looking changes nothing."""

import math

import pandas as pd
import pytest
import torch

from muonlab.data import make_data
from muonlab.record import load_run
from muonlab.record.spectra import group_spectra
from muonlab.train.module import LanguageModel
from muonlab.train.recording import Recording
from muonlab.train.run import run_folder, train

GROUPS = {"embedding", "query", "key", "value", "output", "mlp", "head"}
MATRICES = "matrix_svd_entropy"
MEASURES = {"svd_entropy", "update_svd_entropy", "stable_rank", "overlap", "sigma_max", "frobenius"}
PEAK = [
    "probe_max_logit",
    "argmax_query_norm",
    "argmax_key_norm",
    "argmax_cosine",
    "argmax_layer",
    "argmax_head",
    "query_rms",
    "key_rms",
]


def columns(steps):
    return [name for name in steps if name.split("/")[0] in {*MEASURES, MATRICES} or name in PEAK]


def fresh_module(config):
    torch.manual_seed(config.seed)
    return LanguageModel(config, make_data(config.data, config.paths.cache))


def final_checkpoint(folder):
    return torch.load(sorted((folder / "checkpoints").iterdir())[-1], weights_only=True)


@pytest.mark.parametrize(
    "settings", [[], ["optimizer=adamw", "trainer.accumulate=2"], ["trainer.precision=bf16"]]
)
def test_a_run_that_is_looked_at_takes_the_same_steps_to_the_bit(tiny, settings):
    plain = train(tiny(*settings)).folder
    looked_at = train(tiny("trainer.spectra_every=2", *settings)).folder
    one, other = load_run(plain), load_run(looked_at)
    added = columns(other.steps)
    names = [name for name, p in fresh_module(tiny(*settings)).model.named_parameters() if p.ndim > 1]
    wanted = {f"{measure}/{group}" for measure in MEASURES for group in GROUPS} | set(PEAK)
    assert set(added) == wanted | {f"{MATRICES}/{name}" for name in names}
    assert columns(one.steps) == []
    drop = ["seconds"]
    pd.testing.assert_frame_equal(
        one.steps.drop(columns=drop), other.steps.drop(columns=drop + added), check_exact=True
    )
    pd.testing.assert_frame_equal(one.max_logits, other.max_logits, check_exact=True)
    weights, again = (final_checkpoint(folder)["state_dict"] for folder in (plain, looked_at))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    measured = other.steps[added].notna()
    assert measured.loc[other.steps["step"] % 2 == 0].all(axis=None)
    assert not measured.loc[other.steps["step"] % 2 == 1].any(axis=None)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may handle it."""


def test_a_killed_run_resumes_to_the_same_spectra(tiny, tmp_path, monkeypatch):
    def kill(step):
        if step == 7:
            raise Killed

    whole = train(tiny("trainer.spectra_every=3")).folder
    config = tiny("trainer.spectra_every=3", f"paths.runs={tmp_path / 'killed'}")
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "finish", lambda *_: None)  # a killed process ends nothing
        with pytest.raises(Killed):
            train(config, on_step=kill)
    assert train(config).status == "finished"
    one, other = (load_run(folder).steps.drop(columns="seconds") for folder in (whole, run_folder(config)))
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_the_columns_are_of_the_weights_before_the_step_and_of_the_change_in_it(tiny):
    """One step in full: initial weights against those of the checkpoint after it."""
    config = tiny("trainer.max_steps=1", "schedule.warmup=0", "trainer.spectra_every=1")
    folder = train(config).folder
    row = load_run(folder).steps.iloc[0]
    module = fresh_module(config)
    after = final_checkpoint(folder)["state_dict"]
    routes = {route.name: route.group for route in module.optimizer.routing}
    for group in GROUPS:
        names = [n for n, p in module.model.named_parameters() if routes[n] == group and p.ndim > 1]
        before = [module.model.get_parameter(name).detach() for name in names]
        updates = [after[f"model.{n}"].double() - w.double() for n, w in zip(names, before, strict=True)]
        for measure, value in group_spectra(before, updates).items():
            assert row[f"{measure}/{group}"] == pytest.approx(value.item(), rel=1e-9, abs=1e-12)
        apart = [row[f"{MATRICES}/{name}"] for name in names]
        assert sum(apart) / len(apart) == pytest.approx(row[f"svd_entropy/{group}"], rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "head_dim"),
    [
        ([], 8),
        (["model.num_kv_heads=1", "model.rotary_fraction=0.5"], 8),
        (["model.qk_norm=true", "optimizer=adamw"], 8),
        (["model=moe_xs"], 32),  # latent attention: 16 entries with positions and 16 without
    ],
)
def test_the_peak_is_the_models_own_largest_logit_on_the_probe_batch(tiny, settings, head_dim):
    config = tiny(*settings, "trainer.max_steps=1", "schedule.warmup=0", "trainer.spectra_every=1")
    row = load_run(train(config).folder).steps.iloc[0]
    module = fresh_module(config)
    ((tokens, targets),) = module.data.eval_batches(config.trainer.probe_batch_size, module.context, 1)
    module.model(tokens, targets)  # in training mode, which keeps the extremes
    highest = module.model.logit_extremes().highest
    assert row["probe_max_logit"] == pytest.approx(highest.max().item(), rel=1e-6)
    layer, head = int(row["argmax_layer"]), int(row["argmax_head"])
    assert highest[layer, head] == highest.max()
    parts = row["argmax_query_norm"] * row["argmax_key_norm"] * row["argmax_cosine"] / math.sqrt(head_dim)
    assert row["probe_max_logit"] == pytest.approx(parts, rel=1e-14)
    if "model.qk_norm=true" in settings:  # gains of one leave every query as long as its dimension is deep
        assert row["query_rms"] == pytest.approx(math.sqrt(head_dim), rel=1e-3)


def test_weights_that_are_no_numbers_end_in_divergence_and_not_in_an_error(tiny):
    outcome = train(
        tiny("trainer.spectra_every=1", "optimizer=adamw", "optimizer.lr=1e38", "schedule.warmup=0")
    )
    assert outcome.status == "diverged"
    steps = load_run(outcome.folder).steps
    assert steps["sigma_max/query"].iloc[0] > 0
    assert len(steps) > 1
    assert not math.isfinite(steps["sigma_max/query"].iloc[-1] * steps["probe_max_logit"].iloc[-1])
