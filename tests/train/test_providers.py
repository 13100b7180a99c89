"""What is recorded comes from providers: one function is one column, and their order means nothing."""

import math

import pandas as pd
import pytest
import torch

from analysis.archive import load_frames, save_frames
from analysis.frames import collect
from muonlab.record import load_run
from muonlab.record.charts import chart_parts
from muonlab.record.columns import HEADS, Chart, HeadColumn, chart_of
from muonlab.train import providers, recording
from muonlab.train.columns import base_rate
from muonlab.train.providers import Columns, provider
from muonlab.train.run import train

SETTINGS = ["trainer.spectra_every=4", "optimizer.tau=0.05", "trainer.accumulate=2"]


@pytest.fixture
def listed(monkeypatch):
    """The list of providers, as it was again at the end."""
    assert recording  # which imports them all before the copy is made
    monkeypatch.setattr(providers, "PROVIDERS", list(providers.PROVIDERS))
    return providers.PROVIDERS


def test_a_function_with_a_cadence_is_a_recorded_column(tiny, listed):
    @provider("largest weight", every=lambda trainer: trainer.probe_every, compares_weights=True)
    def largest_change(step):
        parameters = step.module.model.named_parameters()
        changes = [(p.detach() - step.weights_before[name]).abs().max() for name, p in parameters]
        return Columns({"largest_change": torch.stack(changes).max()})

    @provider("signs", at="gradients", every=lambda trainer: 5)
    def signs(step):
        return Columns({"step_number": float(step.number)}, {"one_hot": torch.ones(2, 2)})

    @provider("never", every=lambda trainer: 0)
    def never(step):
        raise AssertionError("a cadence of 0 is never")

    run = load_run(train(tiny()).folder)
    changed = run.steps.dropna(subset="largest_change")
    assert changed["step"].tolist() == [0, 3, 6, 9]
    assert (changed.loc[changed["lr"] > 0, "largest_change"] > 0).all()
    assert run.steps["step_number"].dropna().tolist() == [0, 5, 10]
    assert set(run.max_logits.query("one_hot == 1")["step"]) == {0, 5, 10}


def test_a_quantity_per_head_is_a_function_and_an_entry(tiny, tmp_path, listed, monkeypatch):
    """The entry says how it is reduced and thinned, from the trace to the charts and to what `results/` keeps."""
    monkeypatch.setitem(HEADS, "order", HeadColumn("order", Chart("softmax/order"), "mean", thinned="max"))
    monkeypatch.setattr("analysis.archive.HEAD_POINTS", 5)

    @provider("order")
    def order(step):
        return Columns(heads={"order": torch.arange(4.0).view(2, 2) + step.number})

    folder = train(tiny()).folder
    run, frames = load_run(folder), collect([folder])
    steps = run.steps["step"]
    assert frames.steps["order"].tolist() == [1.5 + step for step in steps]
    assert next(iter(chart_parts(folder / "traces")))[3]["order/layer_01"] == 5.5
    assert chart_of("order").key == "softmax/order"
    save_frames(frames, tmp_path / "kept")
    kept = load_frames(tmp_path / "kept").heads
    width = math.ceil(steps.max() / 5)
    last = [min(step + width - 1, steps.max()) for step in range(0, len(steps), width)]
    assert kept.query("layer == 1 and head == 1")["order"].tolist() == [3.0 + step for step in last]


def test_providers_in_the_opposite_order_record_the_same_bits(tiny, tmp_path, listed):
    one = load_run(train(tiny(*SETTINGS)).folder)
    listed.reverse()
    other = load_run(train(tiny(*SETTINGS, f"paths.runs={tmp_path / 'reversed'}")).folder)
    drop = ["seconds"]
    pd.testing.assert_frame_equal(
        one.steps.drop(columns=drop), other.steps.drop(columns=drop), check_exact=True
    )
    pd.testing.assert_frame_equal(one.max_logits, other.max_logits, check_exact=True)
    assert one.steps["probe_max_logit"].notna().sum() == 3


def test_the_rate_is_that_of_the_update_and_of_no_group_with_a_factor(tiny):
    plain, scaled = (
        load_run(train(tiny("schedule=cosine", *factors)).folder).steps["lr"]
        for factors in ([], ["optimizer.lr_scale={embedding: 0.5, query: 3.0}"])
    )
    assert plain.tolist() == scaled.tolist()
    assert plain.nunique() > 8
    assert plain.max() == pytest.approx(tiny().optimizer.lr)


def test_without_memory_the_second_moment_lags_by_one_step(tiny):
    """With beta2 = 0 the second moment is the square of the last gradient, so the lag is the ratio of two norms."""
    settings = [
        "optimizer=adamw",
        "optimizer.betas=[0.9,0.0]",
        "trainer.probe_every=1",
        "trainer.grad_clip=0",
    ]
    steps = load_run(train(tiny(*settings)).folder).steps
    ratio = steps["grad_norm"].shift() / steps["grad_norm"]
    assert steps["second_moment_lag"].isna().tolist() == [True] + [False] * (len(steps) - 1)
    torch.testing.assert_close(
        torch.tensor(steps["second_moment_lag"][1:].to_numpy()),
        torch.tensor(ratio[1:].to_numpy()),
        rtol=1e-5,
        atol=0,
    )


def optimizer_with(*groups, **defaults):
    made = torch.optim.SGD([{"params": [torch.zeros(1)], **group} for group in groups], **defaults)
    torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.25)
    return made


def test_the_base_rate_follows_the_groups_that_began_with_the_optimizers_own():
    assert base_rate(optimizer_with({"lr": 3.0}, {}, lr=2.0)) == 0.5
    assert base_rate(optimizer_with({"lr": 4.0}, {"lr": 8.0}, lr=2.0)) == 1.0  # none did: the first


def test_a_tensor_rate_is_copied_since_a_scheduler_writes_into_it():
    made = torch.optim.Adam([torch.zeros(1)], lr=torch.tensor(2.0))
    rate = base_rate(made)
    made.param_groups[0]["lr"].fill_(1.0)
    assert rate == 2.0


def test_an_optimizer_without_a_rate_has_none():
    class Rateless(torch.optim.Optimizer):
        pass

    assert base_rate(Rateless([torch.zeros(1)], {})) is None
