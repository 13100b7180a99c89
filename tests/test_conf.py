"""Configs mirror code: every option composes, and its keys are exactly the settings of its section."""

from pathlib import Path

import pytest
import torch

from muonlab.cli import compose_config, plain, split_sweeps
from muonlab.data import DATA
from muonlab.errors import MuonlabError
from muonlab.help import file_comments, help_page
from muonlab.models.registry import MODELS, make_model
from muonlab.optim import list_optimizers
from muonlab.optim.optimizers import OPTIMIZERS
from muonlab.settings.data import DATA_SETTINGS
from muonlab.settings.model import MODEL_SETTINGS, with_vocabulary
from muonlab.settings.optimizer import NS_SCHEDULES, OPTIMIZER_SETTINGS
from muonlab.settings.schedule import SCHEDULE_SETTINGS
from muonlab.train.config import read_config
from muonlab.train.schedule import SCHEDULES

CONF = Path(__file__).parents[1] / "conf"
REGISTRIES = {"model": MODELS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "data": DATA}
SECTIONS = {
    "model": MODEL_SETTINGS,
    "optimizer": OPTIMIZER_SETTINGS,
    "schedule": SCHEDULE_SETTINGS,
    "data": DATA_SETTINGS,
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(group: str, option: str) -> dict:
    text = ["data.path=x"] if option in ("text", "tokens") else []
    return plain(compose_config("train", [f"{group}={option}", *text]))


ALL = [(group, option) for group in REGISTRIES for option in options(group)]


@pytest.mark.parametrize(("group", "option"), ALL)
def test_an_option_has_exactly_the_settings_of_its_section(group, option):
    section = composed(group, option)[group]
    assert section.keys() - {"name"} == set(REGISTRIES[group].settings(section["name"]))


@pytest.mark.parametrize("group", REGISTRIES)
def test_every_registered_name_has_an_option_and_settings_that_need_no_torch(group):
    names = REGISTRIES[group].names()
    assert set(names) <= set(options(group))
    for name, section in SECTIONS[group].items():
        assert REGISTRIES[group].section(name) is section


def test_the_names_of_schedules_are_those_of_the_optimizers():
    from muonlab.optim import list_schedules

    assert list(NS_SCHEDULES) == list_schedules()
    assert options("optimizer") == list_optimizers()


@pytest.mark.parametrize("option", options("model"))
def test_the_sizes_of_a_model_config_fit_each_other(option):
    settings = read_config(composed("model", option)).model
    with torch.device("meta"):
        model = make_model(with_vocabulary(settings, 256))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("group", "option"),
    [*ALL, *((group, option) for group in ("trainer", "tracking") for option in options(group))],
)
def test_every_option_composes_and_resolves(group, option):
    assert read_config(composed(group, option)).seed == 1


@pytest.mark.parametrize("name", options("experiment"))
def test_every_prepared_experiment_composes_and_yields_to_overrides(name):
    config = read_config(plain(compose_config("train", [f"+experiment={name}", "optimizer.lr=0.5"])))
    assert config.optimizer.lr == 0.5
    assert config.optimizer.weight_decay == 0.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=moun"], "unknown optimizer 'moun'; did you mean 'muon'"),
        (["optimizer.taw=3"], "unknown config key 'optimizer.taw'; did you mean 'optimizer.tau'"),
        (["trainer.max_step=3"], "did you mean 'trainer.max_steps'"),
        (["optimiser=muon"], "did you mean 'optimizer'"),
        (["sed=3"], "did you mean 'seed'"),
        (["seed.first=3"], "unknown config key 'seed.first': 'seed' is a value, without keys of its own"),
        (["~optimizer.lr.low"], "'optimizer.lr' is a value, without keys of its own"),
        (["~optimizer.taw"], "did you mean 'optimizer.tau'"),
        (["data=null"], "data must be the name of one of its options, not null; known: english"),
        (["optimizer.lr=[1"], "'optimizer.lr=[1' is not an override"),
        (["=3"], "it names no key"),
    ],
)
def test_a_misspelt_name_is_reported_with_the_near_ones(overrides, message):
    with pytest.raises(MuonlabError) as caught:
        compose_config("train", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=0", "trainer.max_steps must be a whole number of at least 1, not 0"),
        ("trainer.max_steps=many", "trainer.max_steps must be a whole number of at least 1, not 'many'"),
        ("trainer.precision=fp8", "unknown trainer.precision 'fp8'"),
        ("trainer.batch_order=sequental", "did you mean 'sequential'"),
        ("trainer.device=gpu", "cpu, cuda"),
        ("trainer.devices=3", "does not divide evenly"),
        ("trainer.strategy=fsdp", "unknown trainer.strategy 'fsdp'; did you mean 'fsdp2' or 'ddp'"),
        ("+trainer.steps=3", "unknown trainer setting 'steps'"),
        ("+extra=3", "unknown config section 'extra'"),
        ("seed=-1", "seed must be a whole number of at least 0, not -1"),
        ("seed=abc", "seed must be a whole number"),
        ("seed=true", "seed must be a whole number of at least 0, not true"),
        ("optimizer.lr=fast", "optimizer.lr must be a finite number of at least 0, not 'fast'"),
        ("schedule.warmup=701", "schedule.warmup=701 must be from 0 to the run's 700 steps"),
        ("optimizer.windows=[[5,2]]", "a window is [first step, last step)"),
        ("optimizer.ns_schedule=jordn", "did you mean 'jordan'"),
        ("model.num_heads=3", "num_heads=3 does not divide"),
        ("~optimizer", "the config has no 'optimizer'"),
        ("model=1", "model must be the name of one of its options, not 1; known: k2_shape"),
    ],
)
def test_a_wrong_value_is_reported_in_one_sentence(override, message):
    with pytest.raises(MuonlabError) as caught:
        read_config(plain(compose_config("train", [override])))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_roles_are_routed_and_scaled_from_the_command_line():
    """A mapping of roles is given as one override, without knowing which roles the default names."""
    config = read_config(
        plain(
            compose_config(
                "train",
                ["optimizer=muon", "optimizer.routes={query: adamw}", "optimizer.lr_scale={key: 0.1}"],
            )
        )
    )
    assert config.optimizer.routes == {"query": "adamw"}
    assert config.optimizer.lr_scale == {"key": 0.1}


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [
        (["seed=1,2", "optimizer=muon,adamw"], 4),
        (["optimizer.betas=[0.9,0.95],[0.9,0.99]"], 2),
        (["optimizer.windows=[[0,2]],null"], 2),
        (["optimizer.lr_scale={query: 0.1},{query: 0.2}"], 2),
        (["data.path='a,b','c'"], 2),
        (["optimizer.lr=range(1,4)"], 3),
        (["optimizer=glob(*clip)"], 2),
        (["optimizer.lr=choice(0.1,0.2)", "seed=3"], 2),
        (["seed=3"], 1),
    ],
)
def test_a_multirun_reads_hydras_own_grammar(overrides, jobs):
    found = split_sweeps(overrides)
    assert len(found) == jobs
    assert len({tuple(job) for job in found}) == jobs
    for job in found:
        assert len(job) == len(overrides)


def test_a_sweep_that_the_grammar_lacks_is_one_sentence():
    with pytest.raises(MuonlabError) as caught:
        split_sweeps(["optimizer.lr=interval(0.1,0.2)"])
    assert "\n" not in str(caught.value)


def test_help_shows_the_comment_of_every_setting_beside_its_value():
    """Of the chosen options, with those that they inherit."""
    page = help_page("train", ["optimizer=muonclip", "optimizer.lr=0.5", "model=nanogpt_s"])
    lines = {line.split(":")[0].strip(): line for line in page.splitlines() if "#" in line}
    assert "lr: 0.5" in lines["lr"]
    assert lines["tau"].endswith("# " + file_comments(CONF / "optimizer" / "muonclip.yaml")[("tau",)])
    assert "share of each head's entries" in lines["rotary_fraction"], "inherited from nanogpt.yaml"
    assert "weights and batch order" in lines["seed"]
    commented = set()
    for group in ("model", "optimizer", "schedule", "trainer", "tracking"):
        option = {"model": "nanogpt", "optimizer": "muon", "schedule": "constant"}.get(group)
        found = file_comments(
            CONF / group / f"{option or {'trainer': 'default', 'tracking': 'mlflow'}[group]}.yaml"
        )
        commented |= set(found.values())
    assert len(commented) > 30
    assert all(any(comment in line for line in page.splitlines()) for comment in commented)
