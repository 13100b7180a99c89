"""The sweep of `make sweep`: its command, its report, and what it refuses."""

import re
import shlex

import pandas as pd
import pytest
from mlflow import MlflowClient

from muonlab.cli import compose_config, plain
from muonlab.errors import MuonlabError
from muonlab.record.mlflow_link import Link
from muonlab.record.store import store_uri
from muonlab.study.reading import read_experiment
from muonlab.sweep import make_study, sweep
from muonlab.train.run import with_corpus

# A sweep's trainer has no progress bar and no smoke; its config has no single seed.
SWEEP = [
    "search.trials=2",
    "search.replicate_seeds=[1,2]",
    "search.workers=2",
    "~search.optimizers.adamw",
]


@pytest.fixture
def made(tiny_overrides, tmp_path):
    """made(*overrides) -> the study of a tiny sweep over Muon and MuonClip below tmp_path."""
    paths = [f"paths.{name}={tmp_path / name}" for name in ("runs", "cache", "studies")]

    def make(*overrides):
        design = read_experiment("sweep")
        given = [*tiny_overrides, *SWEEP, *paths, *overrides]
        return make_study(design, plain(compose_config("sweep", [*design.common, *given])), given)

    return make


def test_a_sweep_ends_with_a_comparison_over_fresh_seeds_and_a_finished_one_prints_it(made, capsys):
    study = made()
    assert sweep(study) == 0
    printed = capsys.readouterr().out
    assert "4 trials" not in printed
    assert "Fairness: 2 trials of each optimizer (quasi_random, published setting first)" in printed
    assert "MuonClip" in printed
    assert re.search(
        r"From its best learning rate to 8 times it, max logit at the end: Muon \S+ -> \S+, MuonClip", printed
    )
    trials = pd.read_csv(study.folder / "trials.csv")
    assert trials.groupby("optimizer").size().to_dict() == {"muon": 2, "muonclip": 2}
    assert set(trials["state"]) == {"COMPLETE"}
    for figure in study.design.figures:
        assert (study.folder / f"{figure.name}.png").exists()
    assert {"rates", "spike-vs-stable"} < {figure.name for figure in study.design.figures}

    assert sweep(made()) == 0
    again = capsys.readouterr().out
    assert again.startswith(f"study {study.name} is complete")
    assert "runs done" not in again
    assert "MuonClip" in again

    assert sweep(made("search.trials=3")) == 0
    more = capsys.readouterr().out
    assert "4 of 6 runs done" in more


def test_a_finished_sweep_whose_end_mlflow_does_not_show_is_completed(made, capsys):
    """As where the server was out of reach when the study ended."""
    few = ["tracking=mlflow", "search.trials=1", "search.replicate_seeds=[1]", "~search.optimizers.muonclip"]
    study = made(*few)
    assert sweep(study) == 0
    link = Link.read(study.folder)
    assert link.complete
    client = MlflowClient(store_uri(None, study.base().paths.runs))
    note = client.get_run(link.run_id).data.tags["mlflow.note.content"]
    assert "reaches the lowest loss" in note
    assert "\n| optimizer | validation loss |" in note
    charts = client.get_run(link.run_id).data.metrics
    assert {"loss/search: muon by trial", "max_logit/rates: muon by multiple"} <= set(charts)
    client.update_run(link.run_id, status="RUNNING")
    link.keep(study.folder, complete=False)
    assert sweep(made(*few)) == 0
    assert client.get_run(link.run_id).info.status == "FINISHED"
    assert Link.read(study.folder).complete
    capsys.readouterr()
    assert sweep(made(*few)) == 0
    assert capsys.readouterr().out.startswith(f"study {study.name} is complete")


def test_beyond_the_best_setting_its_learning_rate_alone_is_multiplied_on_two_of_the_fresh_seeds(made):
    study = made("search.replicate_seeds=[4,5,6]")
    levels = {arm: study.slots()[0].level for arm in ("muon", "muonclip")}
    slots = study.slots({"search": levels})
    rates = [slot for slot in slots if slot.condition == "rates" and slot.arm == "muon"]
    setting = levels["muon"].setting
    assert sorted((slot.level.value, slot.seed) for slot in rates) == [
        (f, s) for f in (1, 2, 4, 8) for s in (4, 5)
    ]
    for slot in rates:
        assert slot.config.optimizer.lr == pytest.approx(setting["lr"] * slot.level.value)
        assert slot.config.optimizer.weight_decay == setting["weight_decay"]
    best = {slot.config.identity for slot in slots if slot.condition == "best"}
    assert all(slot.config.identity in best for slot in rates if slot.level.value == 1), (
        "they are the same runs"
    )


def test_a_sweep_that_does_not_search_the_learning_rate_multiplies_none(made):
    spaces = [
        f"~search.optimizers.{name}.{part}.lr"
        for name in ("muon", "muonclip")
        for part in ("published", "space")
    ]
    study = made(*spaces)
    assert list(study.design.conditions) == ["search", "best"]
    assert [figure.name for figure in study.design.figures] == ["best-setting", "lr-sensitivity"]


def test_a_study_is_named_after_its_model_and_what_defines_it(made):
    assert made().name.startswith("nanogpt-")
    assert made().name == made("search.trials=9", "trainer.num_threads=2", "search.workers=1").name
    assert made().name != made("trainer.max_steps=99").name
    space = "search.optimizers.muon.space.lr='interval(0.1, 1.0)'"
    assert made().name != made(space).name
    assert made("study=mine").folder.name == "mine"


def test_a_run_of_a_sweep_is_the_run_that_train_makes_of_the_same_settings(made, tiny):
    slot = made().slots()[0]
    settings = [f"optimizer.{key}={value}" for key, value in slot.level.setting.items()]
    alone = with_corpus(tiny("optimizer=muon", "seed=0", *settings))
    assert slot.config.identity == alone.identity


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.trials=0"], "search.trials must be a whole number of at least 1"),
        (["search.trials=2.5"], "search.trials must be a whole number"),
        (["search.workers=two"], "search.workers must be a whole number"),
        (["search.replicate_seeds=3"], "search.replicate_seeds must be a list"),
        (["search.replicate_seeds=[]"], "search.replicate_seeds must be"),
        (["search.replicate_seeds=[1,1]"], "repeats a seed"),
        (["search.seed=1"], "must not judge its result"),
        (["search.sampler=tpee"], "did you mean 'tpe'"),
        (["study=20261126"], "study must be a name of up to 60 letters"),
        (["search.optimizers=null"], "search.optimizers must be"),
        (["~search.optimizers.muon", "~search.optimizers.muonclip"], "search.optimizers must not be empty"),
        (["~search.optimizers.muon.space.weight_decay"], "equal search effort"),
        (["search.optimizers.muon.space.weight_decay='range(10,1)'"], "is empty"),
        (["search.optimizers.muon.space.weight_decay=0.1"], r"space\.weight_decay must be text, not 0\.1"),
        (["search.optimizers.muon.published.lr=high"], "optimizer.lr must be a finite number"),
        (["search.optimizers.muon.space.lr='tag(log, interval(-1, 1))'"], "empty on a log scale"),
        (
            ["search.optimizers.muon.space.lr='interval(-1, 1)'"],
            "optimizer.lr must be a finite number of at least 0",
        ),
        (["+search.optimizers.muon.published.momentun=0.9"], "did you mean 'momentum'"),
        (
            [
                "+search.optimizers.moun={published: {lr: 1, wd: 1}, space: {lr: 'choice(1)', wd: 'choice(1)'}}"
            ],
            "moun",
        ),
        (["model.num_heads=3"], "num_heads=3 does not divide"),
        (["seed=3"], "seed cannot be set for every run"),
    ],
)
def test_an_unfair_misspelt_or_impossible_sweep_is_refused_in_one_sentence(
    made, overrides, message, tmp_path
):
    with pytest.raises(MuonlabError, match=message) as caught:
        made(*overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "studies").exists()


def test_the_command_that_is_kept_can_be_typed_again(made):
    command = made("search.optimizers.muon.space.lr='tag(log, interval(1e-3, 1e-1))'").command
    assert shlex.split(command)[-1] == "search.optimizers.muon.space.lr='tag(log, interval(1e-3, 1e-1))'"
