"""Configs mirror code: every option composes, and its keys are exactly the builder's settings."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from muonlab.cli import compose_config, plain
from muonlab.errors import MuonlabError
from muonlab.models import build_model
from muonlab.models.registry import MODELS
from muonlab.optim import list_optimizers
from muonlab.optim.registry import OPTIMIZERS
from muonlab.train.config import resolve
from muonlab.train.schedule import SCHEDULES

CONF = Path(__file__).parents[1] / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def keys(group: str, option: str) -> set[str]:
    return set(OmegaConf.load(CONF / group / f"{option}.yaml")) - {"name"}


@pytest.mark.parametrize("option", options("optimizer"))
def test_an_optimizer_config_has_exactly_the_builders_settings(option):
    assert keys("optimizer", option) == set(OPTIMIZERS.settings(option))


def test_every_registered_optimizer_has_a_config():
    assert options("optimizer") == list_optimizers()


@pytest.mark.parametrize("option", options("model"))
def test_a_model_config_has_exactly_the_builders_settings(option):
    name = OmegaConf.load(CONF / "model" / f"{option}.yaml")["name"]
    # The vocabulary is the tokenizer's, but for a published shape.
    assert keys("model", option) - {"vocab_size"} == set(MODELS.settings(name)) - {"vocab_size"}


@pytest.mark.parametrize("option", options("model"))
def test_the_sizes_of_a_model_config_fit_each_other(option):
    settings = plain(compose_config("train", [f"model={option}"]))["model"]
    with torch.device("meta"):
        model = build_model(settings.pop("name"), **{"vocab_size": 256} | settings)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("option", options("schedule"))
def test_a_schedule_config_has_exactly_the_builders_settings(option):
    assert keys("schedule", option) == set(SCHEDULES.settings(option))


@pytest.mark.parametrize(
    "override",
    [
        f"{group}={option}"
        for group in ("model", "optimizer", "schedule", "trainer", "tracking", "data")
        for option in options(group)
    ],
)
def test_every_option_composes_and_resolves(override):
    assert resolve(plain(compose_config("train", [override])))["seed"] == 1


@pytest.mark.parametrize("name", options("experiment"))
def test_every_prepared_experiment_composes_and_yields_to_overrides(name):
    config = resolve(plain(compose_config("train", [f"+experiment={name}", "optimizer.lr=0.5"])))
    assert config["optimizer"]["lr"] == 0.5
    assert config["optimizer"]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=moun"], "unknown optimizer 'moun'; did you mean 'muon'"),
        (["optimizer.taw=3"], "unknown config key 'optimizer.taw'; did you mean 'optimizer.tau'"),
        (["trainer.max_step=3"], "did you mean 'trainer.max_steps'"),
        (["optimiser=muon"], "did you mean 'optimizer'"),
        (["sed=3"], "did you mean 'seed'"),
    ],
)
def test_a_misspelt_name_is_told_with_the_near_ones(overrides, message):
    with pytest.raises(MuonlabError) as caught:
        compose_config("train", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=0", "at least 1"),
        ("trainer.max_steps=many", "trainer.max_steps"),
        ("trainer.precision=fp8", "fp32"),
        ("trainer.batch_order=sequental", "did you mean 'sequential'"),
        ("trainer.device=gpu", "cpu, cuda"),
        ("trainer.devices=3", "does not divide evenly"),
        ("+trainer.steps=3", "unknown trainer setting 'steps'"),
        ("+extra=3", "unknown config section 'extra'"),
        ("seed=-1", "seed must be"),
        ("seed=abc", "seed must be"),
    ],
)
def test_a_wrong_value_is_told_in_one_sentence(override, message):
    with pytest.raises(MuonlabError) as caught:
        resolve(plain(compose_config("train", [override])))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_roles_are_routed_and_scaled_from_the_command_line():
    """A mapping of roles is given as one override, without knowing which roles the default names."""
    config = plain(
        compose_config(
            "train", ["optimizer=muon", "optimizer.routes={query: adamw}", "optimizer.lr_scale={key: 0.1}"]
        )
    )
    assert config["optimizer"]["routes"] == {"query": "adamw"}
    assert config["optimizer"]["lr_scale"] == {"key": 0.1}
