"""One run from config to record: the same bits every time, however it was interrupted."""

import math
import signal
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch

from muonlab.data import make_data
from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.optim import AdamW, CombinedOptimizer, Rule, list_optimizers, register_optimizer, register_rule
from muonlab.optim.optimizers import OPTIMIZERS
from muonlab.optim.routing import parameter_groups
from muonlab.optim.rules import RULES
from muonlab.record import load_run
from muonlab.runtime import memory
from muonlab.train.config import read_config
from muonlab.train.module import LanguageModel
from muonlab.train.run import run_folder, train

WALL_CLOCK = ["seconds"]


def traces(folder):
    run = load_run(folder)
    return run.steps.drop(columns=WALL_CLOCK), run.max_logits


def assert_same_bits(one, other):
    for a, b in zip(traces(one), traces(other), strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    states = [
        torch.load(sorted((folder / "checkpoints").iterdir())[-1], weights_only=True)
        for folder in (one, other)
    ]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    for a, b in zip(*(s["optimizer_states"][0]["state"].values() for s in states), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_who_watches_hears_the_losses_and_max_logits_of_the_record(tiny, monkeypatch):
    monkeypatch.setattr("muonlab.train.recording.READING", 0.0)
    heard = []
    outcome = train(tiny(), heard.append, lambda *reading: heard.append(reading))
    run = load_run(outcome.folder)
    maxima = run.max_logits.groupby("step")["value"].max()
    assert heard[1::2] == list(range(1, 13))
    assert heard[0::2] == list(zip(run.steps["train_loss"], maxima, strict=True))


def test_the_device_is_read_seldom(tiny, monkeypatch):
    monkeypatch.setattr("muonlab.train.recording.READING", 3600.0)
    heard = []
    train(tiny(), on_reading=lambda *reading: heard.append(reading))
    assert len(heard) == 1


@pytest.mark.parametrize("name", list_optimizers())
def test_a_run_records_every_step(tiny, name):
    outcome = train(tiny(f"optimizer={name}"))
    assert (outcome.status, outcome.trained) == ("finished", True)
    run = load_run(outcome.folder)
    steps, heads = run.steps, run.max_logits
    assert steps["step"].tolist() == list(range(12))
    columns = ["tokens", "flops", "seconds", "train_loss", "lr", "grad_norm"]
    assert np.isfinite(steps[columns]).all(axis=None)
    assert steps["tokens"].iloc[-1] == 12 * 4 * 16
    assert steps["lr"].iloc[0] == pytest.approx(run.config["optimizer"]["lr"] / 2)
    assert steps.loc[steps["probe_loss"].notna(), "step"].tolist() == [0, 3, 6, 9]
    assert steps.loc[steps["val_loss"].notna(), "step"].tolist() == [0, 6]
    assert steps.filter(like="update_rms/").notna().any(axis=1).sum() == 4
    assert len(heads) == 12 * 2 * 2
    assert (heads["value_abs"] >= heads["value"]).all()
    assert heads["gamma"].notna().all() == name.endswith("clip")
    assert heads.loc[heads["entropy"].notna(), "step"].unique().tolist() == [0, 3, 6, 9]
    assert set(run.metrics) == {"val_loss", "val_bits_per_byte", "probe_loss"}
    # A byte of the synthetic corpus is a token.
    assert run.metrics["val_bits_per_byte"] == pytest.approx(run.metrics["val_loss"] / math.log(2))
    routed = {row["name"] for row in run.routing}
    assert "blocks.0.attention.query.weight" in routed


def test_an_optimizer_of_ones_own_needs_no_setting_for_its_learning_rate(tiny, monkeypatch):
    monkeypatch.setattr(OPTIMIZERS, "_builders", dict(OPTIMIZERS._builders))
    monkeypatch.setattr(OPTIMIZERS, "_sections", dict(OPTIMIZERS._sections))

    @register_optimizer("steady")
    def steady(model, *, weight_decay=0.0):
        return AdamW(parameter_groups(model, "adamw"), lr=0.002, weight_decay=weight_decay)

    config = read_config({**tiny().as_dict(), "optimizer": {"name": "steady", "weight_decay": 0.1}})
    run = load_run(train(config).folder)
    assert run.status == "finished"
    assert run.steps["lr"].tolist() == [0.001, *[0.002] * 11]


def test_an_optimizer_may_have_no_learning_rate(tiny, monkeypatch):
    """Nor weight decay, which a rule for vectors is not given then."""
    monkeypatch.setattr(OPTIMIZERS, "_builders", dict(OPTIMIZERS._builders))
    monkeypatch.setattr(OPTIMIZERS, "_sections", dict(OPTIMIZERS._sections))

    @dataclass(frozen=True, kw_only=True)
    class Signs:
        length: float = 0.002

    @register_rule("signs")
    class SignRule(Rule):
        settings = Signs

        def update(self, batch):
            signs = [g.sign() for g in batch.grads]
            torch._foreach_add_(batch.params, signs, alpha=-batch.settings(Signs).length)

    @register_optimizer("signs")
    def signs(model, *, length=0.002):
        return CombinedOptimizer(parameter_groups(model, "signs"), "signs", {"signs": Signs(length=length)})

    config = read_config({**tiny().as_dict(), "optimizer": {"name": "signs"}})
    outcome = train(config)
    del RULES["signs"]
    run = load_run(outcome.folder)
    assert (run.status, outcome.folder.name[:9]) == ("finished", "signs-s1-")
    assert run.steps["lr"].isna().all()
    assert run.steps["update_rms/query"].dropna().tolist() == pytest.approx([0.002] * 4, rel=0.01)


def test_the_same_run_twice_is_the_same_to_the_bit_whatever_ran_before(tiny, tmp_path):
    one = train(tiny()).folder
    train(tiny("seed=2", "optimizer=adamw"))
    other = train(tiny(f"paths.runs={tmp_path / 'again'}")).folder
    assert one.name == other.name
    assert_same_bits(one, other)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may handle it."""


@pytest.mark.parametrize(
    "settings", [[], ["trainer.accumulate=2"], ["schedule=cosine", "trainer.grad_clip=0.5"]]
)
def test_a_killed_run_resumes_to_the_same_bits(tiny, tmp_path, settings, monkeypatch):
    from muonlab.train.recording import Recording

    def kill(step):
        if step == 7:
            raise Killed

    whole = train(tiny(*settings)).folder
    config = tiny(f"paths.runs={tmp_path / 'killed'}", *settings)
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "finish", lambda *_: None)  # a killed process ends nothing
        with pytest.raises(Killed):
            train(config, on_step=kill)
    assert load_run(run_folder(config)).steps["step"].max() == 3  # what the checkpoint of step 4 holds
    outcome = train(config)
    assert (outcome.status, outcome.trained) == ("finished", True)
    assert_same_bits(whole, outcome.folder)


def test_a_run_asked_to_stop_keeps_the_step_it_was_in(tiny, tmp_path):
    def interrupt(step):
        if step == 6:
            signal.raise_signal(signal.SIGINT)

    whole = train(tiny()).folder
    config = tiny(f"paths.runs={tmp_path / 'stopped'}")
    outcome = train(config, on_step=interrupt)
    assert outcome.status == "interrupted"
    assert "SIGINT after step 5" in outcome.cause
    run = load_run(outcome.folder)
    assert (run.status, len(run.steps)) == ("interrupted", 6)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(config).status == "finished"
    assert_same_bits(whole, outcome.folder)


def test_a_checkpoint_cut_short_is_passed_over(tiny, tmp_path):
    whole = train(tiny()).folder
    config = tiny(f"paths.runs={tmp_path / 'cut'}")
    train(config, on_step=lambda step: signal.raise_signal(signal.SIGINT) if step == 6 else None)
    (checkpoint,) = (run_folder(config) / "checkpoints").glob("step-00000006.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert train(config).status == "finished"
    assert_same_bits(whole, run_folder(config))


def test_a_finished_run_is_not_trained_again_unless_forced(tiny):
    first = train(tiny())
    assert train(tiny()).trained is False
    forced = train(tiny("force=true"))
    assert (forced.trained, forced.folder) == (True, first.folder)
    (kept,) = (first.folder.parent / ".replaced").iterdir()
    assert_same_bits(kept, forced.folder)


def test_micro_batches_add_up_to_their_step(tiny):
    """Step 0 of three micro-batches: the mean of the three batches' losses, the maximum of their logits."""
    config = tiny("trainer.accumulate=3")
    run = load_run(train(config).folder)
    assert len(run.steps) == 12
    assert run.steps["tokens"].iloc[-1] == 12 * 3 * 4 * 16

    data = make_data(config.data, config.paths.cache)
    torch.manual_seed(config.seed)
    model = LanguageModel(config, data).model
    losses, maxima = [], []
    for index in range(3):
        losses.append(model(*data.batch(config.seed, index, 4, 16)).cross_entropy)
        maxima.append(model.logit_extremes().highest)
    assert run.steps["train_loss"].iloc[0] == torch.stack(losses).mean().item()
    recorded = run.max_logits.query("step == 0")["value"].to_numpy().reshape(2, 2)
    assert (recorded == torch.stack(maxima).amax(0).numpy()).all()


@pytest.mark.parametrize(("maximum", "column"), [("signed", "value"), ("absolute", "value_abs")])
def test_the_clip_acts_on_the_maximum_of_its_setting(tiny, maximum, column):
    heads = load_run(train(tiny(f"optimizer.maximum={maximum}", "optimizer.tau=0.3")).folder).max_logits
    expected = (0.3 / heads[column].clip(lower=0.3)).to_numpy()
    np.testing.assert_allclose(heads["gamma"], expected, rtol=1e-6)
    assert (heads["gamma"] < 1).any()
    assert (heads["value_abs"] > heads["value"]).any()


def test_divergence_is_a_status_with_its_step(tiny):
    outcome = train(tiny("optimizer=adamw", "optimizer.lr=1e30", "schedule.warmup=0"))
    run = load_run(outcome.folder)
    assert (outcome.status, run.status) == ("diverged", "diverged")
    assert "the loss is nan at step" in run.cause
    assert not np.isfinite(run.steps["train_loss"].iloc[-1])
    assert train(tiny("optimizer=adamw", "optimizer.lr=1e30", "schedule.warmup=0")).trained is False


def out_of_memory(refused):
    def exhaust(step):
        if step == 3:
            raise RuntimeError(
                f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {refused} bytes"
            )

    return exhaust


def test_a_size_that_no_try_on_this_machine_could_hold_is_an_outcome(tiny):
    outcome = train(tiny(), on_step=out_of_memory(memory()))
    assert outcome.status == "out-of-memory"
    assert len(load_run(outcome.folder).steps) == 3
    assert train(tiny()).trained is False


def test_memory_that_others_hold_is_a_fault_of_the_environment(tiny):
    with pytest.raises(EnvironmentFault, match="not enough memory is free"):
        train(tiny(), on_step=out_of_memory(1))
    assert load_run(run_folder(tiny())).status == "interrupted"
    assert train(tiny()).status == "finished"


def test_another_fault_is_recorded_and_raised(tiny):
    def fail(step):
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError):
        train(tiny(), on_step=fail)
    run = load_run(run_folder(tiny()))
    assert (run.status, run.cause) == ("failed", "ZeroDivisionError: on purpose")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.qk_norm=true"], "QK-norm"),
        (["model.context=5000"], "context 5000 needs 5,001 tokens"),
        (["model.vocab_size=8"], "smaller than the 32 tokens"),
        (["trainer.device=cuda", "trainer.devices=64", "trainer.batch_size=64"], "CUDA devices"),
        (["trainer.device=cpu", "trainer.devices=512", "trainer.batch_size=512"], "processor cores"),
        (["trainer.device=cpu", "trainer.precision=fp16"], "precision=fp16 needs a GPU"),
        (["optimizer=muon", "optimizer.split_qkv=false"], "fused QKV weight"),
        (["optimizer=muon", "optimizer.routes={qery: adamw}"], "did you mean 'query'"),
    ],
)
def test_a_mistake_that_only_the_parts_can_see_is_reported_before_anything_is_recorded(
    tiny, tmp_path, overrides, message
):
    with pytest.raises(MuonlabError) as caught:
        train(tiny(*overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "runs").glob("*"))


def test_numbers_that_are_lost_in_the_last_step_or_in_an_svd_are_divergence(tiny):
    last = train(tiny("optimizer=muon", "optimizer.lr=1e30", "schedule.warmup=0", "trainer.max_steps=1"))
    assert (last.status, load_run(last.folder).status) == ("diverged", "diverged")
    assert "after the last step" in last.cause
    exact = train(
        tiny("optimizer=muon", "optimizer.lr=1e30", "optimizer.ns_schedule=svd", "schedule.warmup=0")
    )
    assert exact.status == "diverged"


def test_one_process_is_one_process_whatever_the_batch_system_says(tiny, monkeypatch):
    slurm = {"JOB_ID": "1", "JOB_NAME": "train", "NTASKS": "4", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert train(tiny()).status == "finished"
