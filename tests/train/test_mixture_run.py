"""A run of a model with routed experts: loads and measurements in its record, the balance bias in its checkpoint."""

import pytest
import torch

from muonlab.data import make_data
from muonlab.record import load_run
from muonlab.train.module import LanguageModel
from muonlab.train.run import run_folder, train

MOE = ["model=moe_xs", "model.num_layers=3", "model.num_experts=8", "model.expert_hidden=16"]
CHOICES = 4 * 16 * 2  # tokens of a batch, times experts a token


@pytest.fixture
def mixture(tiny):
    """compose(*overrides) -> a config of a tiny run with experts in layers 1 and 2."""
    return lambda *overrides: tiny(*MOE, *overrides)


def last_checkpoint(folder):
    return torch.load(sorted((folder / "checkpoints").iterdir())[-1], weights_only=True)


def biases(folder):
    return {
        name: value for name, value in last_checkpoint(folder)["state_dict"].items() if "balance_bias" in name
    }


def build(config):
    torch.manual_seed(config.seed)
    return LanguageModel(config, make_data(config.data, config.paths.cache))


def test_loads_of_every_step_and_measurements_with_the_probe(mixture):
    run = load_run(train(mixture()).folder)
    experts = run.experts
    assert len(experts) == 12 * 2 * 8
    assert sorted(experts["layer"].unique()) == [1, 2]  # as in max_logits; layer 0 is dense
    assert set(run.max_logits["layer"]) == {0, 1, 2}
    shares = experts.groupby(["step", "layer"])["load"].sum()
    assert shares.to_numpy() == pytest.approx(1)
    assert ((experts["load"] * CHOICES).round(3) % 1 == 0).all()  # whole tokens
    probed = run.steps[run.steps["probe_loss"].notna()]
    assert probed["step"].tolist() == [0, 3, 6, 9]
    for layer in (1, 2):
        violation = run.steps[f"balance/violation/layer_{layer:02d}"]
        assert violation.notna().sum() == 4
        largest = experts.query("layer == @layer").groupby("step")["load"].max()
        assert violation.dropna().to_numpy() == pytest.approx(
            8 * largest[[0, 3, 6, 9]].to_numpy() - 1, rel=1e-5
        )
    assert all(bias.abs().max() > 0 for bias in biases(run.folder).values())


def test_a_dense_run_has_no_experts(tiny):
    experts = load_run(train(tiny()).folder).experts
    assert (len(experts), experts.columns.tolist()) == (0, ["step", "layer", "expert", "load"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_micro_batches_make_one_step_of_the_bias(mixture, accumulate):
    """b += u sign(mean - load) once a step, by the loads of all its micro-batches."""
    config = mixture(f"trainer.accumulate={accumulate}", "trainer.max_steps=1", "schedule.warmup=0")
    run = load_run(train(config).folder)
    module = build(config)
    for index in range(accumulate):
        module.model(*module.data.batch(config.seed, index, 4, 16))
    loads = module.model.expert_loads()
    recorded = run.experts["load"].to_numpy().reshape(2, 8)
    assert recorded == pytest.approx((loads / (accumulate * CHOICES)).numpy())
    expected = config.model.balance_speed * (loads.mean(-1, keepdim=True) - loads).sign()
    for bias, row in zip(biases(run.folder).values(), expected, strict=True):
        torch.testing.assert_close(bias, row)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may handle it."""


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_resumes_to_the_same_bits(mixture, tmp_path, accumulate, monkeypatch):
    from muonlab.train.recording import Recording

    def kill(step):
        if step == 7:
            raise Killed

    whole = train(mixture(f"trainer.accumulate={accumulate}")).folder
    config = mixture(f"trainer.accumulate={accumulate}", f"paths.runs={tmp_path / 'killed'}")
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "finish", lambda *_: None)  # a killed process ends nothing
        with pytest.raises(Killed):
            train(config, on_step=kill)
    assert load_run(run_folder(config)).experts["step"].max() == 3
    resumed = train(config).folder
    for trace in ("steps", "max_logits", "experts"):
        one, other = (getattr(load_run(folder), trace) for folder in (whole, resumed))
        assert one.drop(columns="seconds", errors="ignore").equals(
            other.drop(columns="seconds", errors="ignore")
        )
    one, other = (last_checkpoint(folder)["state_dict"] for folder in (whole, resumed))
    assert any("balance_bias" in name for name in one)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_step_that_the_gradient_scaler_skips_ends_for_the_routers(mixture, monkeypatch):
    """The weights stay, the loads were real: the bias moves, and the next step counts from none."""
    from lightning.pytorch.plugins.precision import Precision

    def skip(self, optimizer, model, closure, **_):
        """What Lightning does where its scaler, which only a GPU has, finds an infinite gradient."""
        return self._wrap_closure(model, optimizer, closure)

    monkeypatch.setattr(Precision, "optimizer_step", skip)
    config = mixture("trainer.max_steps=2", "schedule.warmup=0")
    run = load_run(train(config).folder)
    assert last_checkpoint(run.folder)["optimizer_states"][0]["steps_done"] == 0
    module = build(config)
    for index in range(2):
        module.model(*module.data.batch(config.seed, index, 4, 16))
        loads = module.model.expert_loads()
        recorded = run.experts.query("step == @index")["load"].to_numpy().reshape(2, 8)
        assert recorded == pytest.approx(
            (loads / CHOICES).numpy()
        )  # same weights, and the bias of `index` steps
        module.model.update_balance()
    for bias, layer in zip(biases(run.folder).values(), module.model.expert_layers.values(), strict=True):
        assert torch.equal(bias, layer.router.balance_bias)
