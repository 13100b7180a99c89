"""What an experiment's file may say, and that every file kept here can be run."""

import copy

import pytest
import yaml

from analysis.compose import KINDS
from muonlab.cli import project_folder
from muonlab.errors import MuonlabError
from muonlab.experiment import at_scale, cells, check_spec, load_experiment
from muonlab.experiment.catalogue import experiment_names, with_catalogue
from muonlab.experiment.spec import read_experiment

NAMES = sorted(path.stem for path in project_folder("experiments").glob("*.yaml"))
CLAIM = {"claim": "c", "source": "s", "condition": "best", "arm": "muon"}


@pytest.fixture
def design():
    words = dict.fromkeys(("question", "prediction", "source", "held_equal", "tuning", "primary"), "said")
    return words | {
        "minutes": 1,
        "seeds": [1, 2],
        "common": ["model=nanogpt_xxs"],
        "scales": {"gpu": {"common": ["model=nanogpt_s"], "seeds": [5], "minutes": 60}},
        "conditions": {
            "search": {
                "seeds": [0],
                "vary": {"optimizer.lr": [0.01, 0.03]},
                "arms": {
                    "adamw": {"overrides": ["optimizer=adamw"], "vary": {"optimizer.lr": [0.001]}},
                    "muon": ["optimizer=muon"],
                },
            },
            "best": {"tuned_on": "search", "arms": {"muon": ["optimizer=muon"]}},
        },
        "claims": [],
        "figures": [{"name": "f", "kind": "traces"}],
    }


def sample(spec):
    """One level of every arm and of every condition, since composing takes a seventh of a second each."""
    spec, seen = copy.deepcopy(spec), []
    for section in spec["conditions"].values():
        arms, section["arms"] = section["arms"], {}
        for name, arm in arms.items():
            if arm not in seen or not section["arms"]:
                section["arms"][name] = copy.deepcopy(arm)
                seen.append(arm)
        for place in (section, *(arm for arm in section["arms"].values() if isinstance(arm, dict))):
            if "vary" in place:
                place["vary"] = {key: values[:1] for key, values in place["vary"].items()}
            if "levels" in place:
                place["levels"] = dict(list(place["levels"].items())[:1])
    return spec


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_composes_and_draws_kinds_that_exist(name):
    spec = load_experiment(name)
    found = cells(name, sample(spec), [])
    untuned = {condition for condition, section in spec["conditions"].items() if "tuned_on" not in section}
    assert {cell.condition for cell in found} == untuned
    assert len({cell.label for cell in found}) == len(found)
    for figure in spec["figures"]:
        assert figure["kind"] in KINDS


def test_the_shortest_experiments_come_first():
    minutes = [read_experiment(name)["minutes"] for name in experiment_names()]
    assert minutes == sorted(minutes)
    assert len(minutes) == len(NAMES)


def test_the_catalogue_is_the_one_that_is_printed():
    path = project_folder("experiments") / "README.md"
    text = path.read_text(encoding="utf-8")
    assert with_catalogue(text) == text, "run python -m muonlab.experiment.catalogue"
    assert all(f"| [{name}]({name}.yaml) |" in text for name in NAMES)
    with pytest.raises(MuonlabError, match="no place for the catalogue"):
        with_catalogue("nothing")


def test_a_scale_changes_seeds_minutes_and_model(design):
    check_spec(design)
    gpu = at_scale(design, "gpu")
    assert (gpu["seeds"], gpu["minutes"], gpu["scale"]) == ([5], 60, "gpu")
    found = cells("x", gpu, [])
    assert {cell.config["model"]["d_model"] for cell in found} == {128}
    assert {cell.seed for cell in found} == {0}, "a condition's own seeds stay"
    design["scales"]["gpu"]["conditions"] = {"search": {"vary": {"optimizer.lr": [0.5]}}}
    check_spec(design)
    changed = at_scale(design, "gpu")["conditions"]["search"]
    assert (changed["vary"], changed["seeds"]) == ({"optimizer.lr": [0.5]}, [0]), "the rest stays"
    cpu = at_scale(design, "cpu")
    assert (cpu["seeds"], cpu["minutes"], cpu["scale_common"]) == ([1, 2], 1, [])
    with pytest.raises(MuonlabError, match="did you mean 'gpu'"):
        at_scale(design, "gpuu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(seed=[1]), "did you mean 'seeds'"),
        (lambda d: d.pop("prediction"), "lacks 'prediction'"),
        (lambda d: d["scales"]["gpu"].update(commmon=[]), "did you mean 'common'"),
        (lambda d: d["scales"]["gpu"].update(conditions={"serch": {}}), "did you mean 'search'"),
        (lambda d: d["scales"]["gpu"].update(conditions={"search": {"arm": {}}}), "did you mean 'arms'"),
        (lambda d: d["conditions"]["search"].update(varry={}), "did you mean 'vary'"),
        (
            lambda d: d["conditions"]["search"]["arms"]["adamw"].update(override=[]),
            "did you mean 'overrides'",
        ),
        (lambda d: d["conditions"]["best"].update(arms={}), "has no arms"),
        (lambda d: d["conditions"]["best"].update(tuned_on="serch"), "did you mean 'search'"),
        (lambda d: d["conditions"]["best"].update(seeds=[0, 1]), "same seed 0"),
        (lambda d: d["conditions"]["best"]["arms"].update(muonn=[]), "did you mean 'muon'"),
        (lambda d: d["conditions"].update(third={"tuned_on": "best", "arms": {"muon": []}}), "itself tuned"),
        (lambda d: d["figures"][0].update(conditions=["bst"]), "did you mean 'best'"),
        (lambda d: d["claims"].append(CLAIM | {"metric": "los", "above": 1}), "did you mean 'loss'"),
        (
            lambda d: d["claims"].append(CLAIM | {"metric": "loss", "above": 1, "figure": "g"}),
            "figure of 'c'",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(design, change, message):
    change(design)
    with pytest.raises(MuonlabError, match=message):
        check_spec(design)


def test_a_file_that_is_no_yaml_and_a_misspelt_name_are_told(tmp_path, monkeypatch, design):
    with pytest.raises(MuonlabError, match="did you mean 'ablation'"):
        load_experiment("ablatoin")
    monkeypatch.setattr("muonlab.experiment.spec.project_folder", lambda _: tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(MuonlabError, match=r"bad\.yaml is not YAML"):
        load_experiment("bad")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(design))
    assert load_experiment("good", "gpu")["scale_common"] == ["model=nanogpt_s"]
