"""What an experiment's file may say, and that every file kept here can be run."""

import copy
from dataclasses import replace

import pytest
import yaml
from tiny_designs import PUBLISHED, WORDS, search

from analysis.figures import read_figure
from muonlab.cli import compose_config, plain, project_folder
from muonlab.errors import MuonlabError
from muonlab.experiment import make_study
from muonlab.study.catalogue import experiment_names, with_catalogue
from muonlab.study.design import Arm, searches
from muonlab.study.reading import at_scale, load_experiment, make_design, read_design, read_experiment
from muonlab.study.slots import slots
from muonlab.train.config import read_config

NAMES = sorted(path.stem for path in project_folder("experiments").glob("*.yaml"))
CLAIM = {"claim": "c", "source": "s", "condition": "best", "arm": "muon"}


def compose(overrides):
    return read_config(plain(compose_config("train", overrides)))


@pytest.fixture
def design():
    return WORDS | {
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


def test_a_file_is_read_as_it_is_written(design, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(design).replace("- 0.03", "- 3e-2"))
    assert read_design(path).conditions["search"].vary == {"optimizer.lr": [0.01, 0.03]}
    for text, said in (
        (b"question: a\nquestion: b\n", "'question' is given twice"),
        (b"\xff\xfe", "mine.yaml is not YAML"),
        (b"a: [", "mine.yaml is not YAML"),
        (b"", "must hold a mapping"),
    ):
        path.write_bytes(text)
        with pytest.raises(MuonlabError, match=said) as caught:
            read_design(path)
        assert "\n" not in str(caught.value)


def sample(made):
    """One level of every arm and of every condition, since composing takes a seventh of a second each."""
    conditions, seen = {}, []
    for name, section in made.conditions.items():
        arms = {}
        for arm, details in made.arms_of(name).items():
            if details not in seen or not arms:
                arms[arm] = shortened(details)
                seen.append(details)
        kept = {arm: vars(details) for arm, details in arms.items()} if section.arms else {}
        conditions[name] = replace(shortened(section), arms=kept)
    return replace(made, conditions=conditions)


def shortened(section):
    if section.vary is not None:
        section = replace(section, vary={key: values[:1] for key, values in section.vary.items()})
    if section.levels is not None:
        section = replace(section, levels=dict(list(section.levels.items())[:1]))
    return section


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_composes_and_its_figures_can_be_drawn(name):
    made = load_experiment(name)
    found = slots(sample(made), compose)
    untuned = {condition for condition, section in made.conditions.items() if not section.tuned_on}
    assert {slot.condition for slot in found} == untuned
    assert len({slot.name for slot in found}) == len(found)
    for figure in made.figures:
        read_figure(
            figure.as_mapping(),
            {name: each.windows for name, each in made.conditions.items() if each.windows},
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_design_is_what_it_says_of_itself(name):
    made = read_experiment(name)
    assert make_design(yaml.safe_load(yaml.safe_dump(made.as_mapping()))) == made


def test_a_search_names_a_sampler_and_spaces_in_place_of_levels(design):
    assert set(read_experiment("sweep").arms_of("best")) == {"adamw", "muon", "muonclip"}
    assert searches(read_experiment("sweep"), "search").sampler == "quasi_random"
    design["conditions"]["search"] = {"seeds": [0], "search": search("tpe", 3)}
    made = make_design(design)
    assert made.arms_of("search") == {"muon": Arm(overrides=("optimizer=muon",))}
    assert searches(made, "search").optimizers["muon"].published == PUBLISHED


def test_the_shortest_experiments_come_first():
    minutes = [read_experiment(name).minutes for name in experiment_names()]
    assert minutes == sorted(minutes)
    assert len(minutes) == len(NAMES)


def test_the_catalogue_is_the_one_that_is_printed():
    path = project_folder("experiments") / "README.md"
    text = path.read_text(encoding="utf-8")
    assert with_catalogue(text) == text, "run python -m muonlab.study.catalogue"
    assert all(f"| [{name}]({name}.yaml) |" in text for name in NAMES)
    with pytest.raises(MuonlabError, match="no place for the catalogue"):
        with_catalogue("nothing")


def test_a_scale_changes_seeds_minutes_and_model(design):
    made = make_design(design)
    gpu = at_scale(made, "gpu")
    assert (gpu.seeds, gpu.minutes, gpu.scale) == ([5], 60, "gpu")
    found = slots(gpu, compose)
    assert {slot.config.model.d_model for slot in found} == {128}
    assert {slot.seed for slot in found} == {0}, "a condition's own seeds stay"
    design["scales"]["gpu"]["conditions"] = {"search": {"vary": {"optimizer.lr": [0.5]}}}
    changed = at_scale(make_design(design), "gpu").conditions["search"]
    assert (changed.vary, changed.seeds) == ({"optimizer.lr": [0.5]}, [0]), "the rest stays"
    cpu = at_scale(made, "cpu")
    assert (cpu.seeds, cpu.minutes, cpu.scale_common) == ([1, 2], 1, ())
    with pytest.raises(MuonlabError, match="did you mean 'gpu'"):
        at_scale(made, "gpuu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(seed=[1]), "did you mean 'seeds'"),
        (lambda d: d.pop("prediction"), "prediction is missing"),
        (lambda d: d.update(seeds=[]), "seeds must be"),
        (lambda d: d.update(seeds=[1, "two"]), "seeds must be a list, each entry a whole number"),
        (lambda d: d.update(minutes="few"), "minutes must be a number"),
        (lambda d: d.update(conditions=[]), "conditions must be a mapping"),
        (lambda d: d["conditions"].update(other={"search": "defaul"}), "did you mean 'default'"),
        (lambda d: d["scales"]["gpu"].update(commmon=[]), "did you mean 'common'"),
        (lambda d: d["scales"]["gpu"].update(conditions={"serch": {}}), "did you mean 'search'"),
        (lambda d: d["scales"]["gpu"].update(conditions={"search": {"arm": {}}}), "did you mean 'arms'"),
        (lambda d: d["conditions"]["search"].update(varry={}), "did you mean 'vary'"),
        (
            lambda d: d["conditions"]["search"]["arms"]["adamw"].update(override=[]),
            "did you mean 'overrides'",
        ),
        (lambda d: d["conditions"]["search"].update(arms={}), "has no arms"),
        (lambda d: d["conditions"]["search"].update(search="default"), "give one of them"),
        (
            lambda d: d["conditions"].update(tpe={"search": search("tpe"), "seeds": [3, 4]}),
            "learns from one run per setting",
        ),
        (
            lambda d: d["conditions"].update(tpe={"search": search(), "seeds": [3], "arms": {"moun": []}}),
            "did you mean 'muon'",
        ),
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
    design = copy.deepcopy(design)
    change(design)
    with pytest.raises(MuonlabError, match=message) as caught:
        make_design(design)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_yaml_and_a_misspelt_name_are_reported(tmp_path, monkeypatch, design):
    with pytest.raises(MuonlabError, match="did you mean 'ablation'"):
        load_experiment("ablatoin")
    monkeypatch.setattr("muonlab.study.reading.project_folder", lambda _: tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(MuonlabError, match=r"bad\.yaml is not YAML"):
        load_experiment("bad")
    (tmp_path / "small.yaml").write_text("a: [1e-400]")
    with pytest.raises(MuonlabError, match="1e-400 is too small for a floating-point number"):
        load_experiment("small")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(design))
    assert load_experiment("good", "gpu").scale_common == ("model=nanogpt_s",)


def test_a_scales_answers_say_what_they_are_about(design):
    design["scales"]["gpu"] |= {"about": "GPT-2", "prediction": "Less."}
    claim = {
        "claim": "It learns",
        "source": "s",
        "condition": "best",
        "arm": "muon",
        "metric": "loss",
        "below": 3.0,
    }
    made = make_design(design | {"claims": [claim | {"headlines": {"reproduced": "So it is"}}]})
    gpu = at_scale(made, "gpu")
    assert (made.prediction, gpu.prediction) == (design["prediction"], "Less.")
    assert [claim.claim for claim in made.all_claims()] == ["It learns"]
    for same in (gpu, make_design(gpu.as_mapping())):
        [claim] = same.all_claims()
        assert (claim.claim, claim.headlines) == ("It learns (GPT-2)", {"reproduced": "So it is (GPT-2)"})


@pytest.mark.parametrize("name", [n for n in experiment_names() if read_experiment(n).scales])
def test_every_scale_of_every_experiment_can_be_read(name):
    for scale in read_experiment(name).scales:
        assert load_experiment(name, scale).scale == scale


@pytest.mark.parametrize("name", ["ablation", "lr_sensitivity", "remedies"])
def test_a_run_at_gpu_short_is_one_of_gpt2s_size_of_64k_tokens_a_step(name, tmp_path, monkeypatch):
    for slot in gpu_short(name, tmp_path, monkeypatch):
        model = slot.config.model
        assert model.qk_norm == slot.arm.endswith("qknorm")
        assert (model.num_layers, model.d_model) == ((6, 384) if slot.condition == "half" else (12, 768))


def test_a_mixture_at_gpu_short_is_one_override(tmp_path, monkeypatch):
    for slot in gpu_short("ablation", tmp_path, monkeypatch, "model=moe_m"):
        assert slot.config.model.num_experts == 64


def gpu_short(name, folder, monkeypatch, *overrides):
    """Its slots, each a run of 64k tokens a step."""
    monkeypatch.setattr("muonlab.study.study._corpus", lambda *_: "0" * 12)
    given = ["scale=gpu-short", f"data.path={folder / 'corpus.tokens'}", *overrides]
    slots = make_study(name, given, folder, 1).slots()
    for slot in slots:
        trainer = slot.config.trainer
        assert trainer.sequences * slot.config.model.context == 2**16
        assert 200 <= trainer.max_steps <= 600
        assert slot.config.data.name == "tokens"
    return slots
