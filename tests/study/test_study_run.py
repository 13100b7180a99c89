"""A study from its design to its answers: two stages, levels, claims, and what is kept."""

import json
import sys

import pandas as pd
import pytest
import yaml
from tiny_designs import search

from analysis.answers import ANSWER_COLUMNS
from analysis.archive import load_frames
from analysis.claims import read_claim
from analysis.evidence import write_evidence
from analysis.redraw import redraw
from muonlab import experiment
from muonlab.errors import MuonlabError
from muonlab.study.answering import figure_of
from muonlab.study.design import Figure
from muonlab.study.judging import answers_text, judge
from muonlab.study.run import train_study
from muonlab.study.slots import Level
from muonlab.study.study import FILE
from muonlab.study.tuning import best_levels

ADAMW = {"overrides": ["optimizer=adamw"], "vary": {"optimizer.lr": [1e-3, 1e-9]}}
MUON = {"overrides": ["optimizer=muon"], "vary": {"optimizer.lr": [0.0125]}}
BOTH = {"adamw": ["optimizer=adamw"], "muon": ["optimizer=muon"]}


@pytest.fixture
def two_stages(study):
    claim = {"source": "nobody", "condition": "best", "arm": "muon"}
    second = {"name": "steps_to_target", "target": 0.0}
    return study(
        {
            "search": {"seeds": [0], "arms": {"adamw": ADAMW, "muon": MUON}},
            "best": {"tuned_on": "search", "heads": True, "arms": BOTH},
        },
        claims=[
            claim | {"claim": "The first", "metric": "loss", "baseline": "adamw", "expect": "lower"},
            claim
            | {"claim": "The second", "measure": second, "above": 1}
            | {"contradicts": "a and b", "sides": {"reproduced": "a"}},
        ],
        figures=[{"name": "traces", "kind": "traces", "conditions": ["best"]}],
    )


def test_an_experiment_ends_with_answers_tables_and_figures(tmp_path, capsys, two_stages):
    trained, tuned, _ = train_study(two_stages)
    assert [(best.arm, best.level, best.edge) for best in tuned] == [
        ("adamw", Level(0.001, ("optimizer.lr=0.001",)), "highest"),
        ("muon", Level(0.0125, ("optimizer.lr=0.0125",)), ""),
    ]
    assert "0 of 3 runs done" in capsys.readouterr().out
    again, tuned_again, _ = train_study(two_stages)
    assert (again, tuned_again) == (trained, tuned)
    assert "7 of 7 runs done" in capsys.readouterr().out

    out = tmp_path / "results" / "tiny"
    judgement = judge(two_stages, trained, tuned, out)
    answers = json.loads((out / "answers.json").read_text())
    assert [list(row) for row in answers] == [ANSWER_COLUMNS] * 2
    assert [row["id"] for row in answers] == ["tiny-01", "tiny-02"]
    assert {(row["question"], row["command"], row["figure"], row["n"]) for row in answers} == {
        ("said", "the command", "traces", 2)
    }
    assert answers[0]["note"].startswith("search/adamw: best of 2 levels is 0.001")
    assert answers[1]["note"] == "", "muon's search had one level"
    assert (answers[1]["answer"], answers[1]["side"]) == ("unresolved", "neither"), "two of two seeds"
    assert "2 never reached" in answers[1]["effect"]
    text = answers_text(two_stages.design, judgement, tuned)
    assert all(row["claim"] in text for row in answers)

    frames = load_frames(out)
    assert len(frames.runs) == 7
    tuned_rate = frames.runs[frames.runs["condition"] == "best"].groupby("arm")["level"].first()
    assert tuned_rate.to_dict() == {"adamw": 0.001, "muon": 0.0125}
    assert set(frames.steps["level"]) == {1e-9, 0.001, 0.0125}
    assert set(frames.heads["condition"]) == {"best"}
    assert frames.heads["value"].max() == pytest.approx(
        frames.runs.loc[frames.runs["condition"] == "best", "max_logit"].max()
    )
    made = json.loads((out / "made.json").read_text())
    assert made["command"] == "the command"
    assert made["runs"]["commits"]
    assert yaml.safe_load((out / "experiment.yaml").read_text())["seeds"] == [1, 2]
    assert pd.read_csv(out / "tuned.csv")["edge"].tolist()[0] == "highest"
    assert [path.name for path in redraw(out)] == ["traces.png"]
    page = write_evidence(tmp_path / "results").read_text()
    assert "2 claims of papers, judged by code in 1 experiments with 7 runs" in page


def test_equal_runs_are_trained_once(study, capsys):
    short = {"arms": {"adamw": ["optimizer=adamw", "trainer.max_steps=4"]}}
    trained, tuned, _ = train_study(study({"one": short, "two": short}))
    printed = capsys.readouterr().out
    assert printed.count("validation loss") == 2
    assert "one/adamw/s1  validation loss" in printed
    assert tuned == []
    assert len({folder for _, folder in trained}) == 2


def test_a_mistake_is_found_before_the_first_run(study, tmp_path):
    made = study({"c": {"arms": {"muon": ["optimizer=muon", "model.num_heads=3"]}}})
    with pytest.raises(MuonlabError, match=r"num_heads=3 does not divide"):
        train_study(made)
    assert not (tmp_path / "runs").exists()


def test_the_best_level_is_the_lowest_mean_and_a_name_has_no_edge(monkeypatch, study):
    losses = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 2.0}
    monkeypatch.setattr("muonlab.study.tuning.load_run", losses.get)
    monkeypatch.setattr("muonlab.study.tuning.objective", lambda loss: loss)
    arms = {"muon": ["optimizer=muon"]}
    design = study(
        {"search": {"seeds": [0], "arms": arms}, "best": {"tuned_on": "search", "arms": arms}}
    ).design

    def slot(level, condition="search"):
        return type("Slot", (), {"condition": condition, "arm": "muon", "level": level})()

    low, high = Level(0.1), Level(0.3)
    [best] = best_levels([(slot(low), "a"), (slot(low), "b"), (slot(high), "c")], design)
    assert (best.level, best.loss, best.edge) == (low, 2.0, "lowest"), "of equal ones the first"
    [named] = best_levels([(slot(Level("x")), "a"), (slot(Level("y")), "b")], design)
    assert (named.level.value, named.edge) == ("y", "")
    inside = [(slot(Level(0.1)), "a"), (slot(Level(0.2)), "b"), (slot(Level(0.3)), "c")]
    assert best_levels(inside, design)[0].edge == ""
    assert best_levels([(slot(low, "best"), "a")], design) == []


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_torn_study_file_is_kept_aside_and_written_again(study, capsys, share):
    """Whether what is left is YAML or not: a prefix of it looks like another study."""
    made = study({"search": {"search": search(trials=5), "seeds": [0]}, "best": {"tuned_on": "search"}})
    made.save()
    whole = (made.folder / FILE).read_bytes()
    (made.folder / FILE).write_bytes(whole[: int(share * len(whole))])
    made.save()
    assert (made.folder / FILE).read_bytes() == whole
    assert (made.folder / f"{FILE}.torn").read_bytes() == whole[: int(share * len(whole))]
    assert "was torn; it is kept as study.yaml.torn and written again" in capsys.readouterr().err


def test_every_study_is_saved_before_the_first_run(study, tmp_path, monkeypatch):
    """So that a worker which starts beside `muonlab.experiment all` sees them all; one mistake costs one experiment."""
    studies = {
        name: study({"a": {"arms": {"muon": ["optimizer=muon"]}}}, name=name)
        for name in ("one", "two", "three")
    }

    def check_places(study, pool):
        if study.name == "two":
            raise MuonlabError("a mistake")

    run = []

    def run_experiment(study, results):
        assert [name for name in studies if (studies[name].folder / FILE).exists()] == ["one", "three"]
        run.append(study.name)

    monkeypatch.setattr("muonlab.study.run._check_places", check_places)
    monkeypatch.setattr(experiment, "experiment_names", lambda: list(studies))
    monkeypatch.setattr(experiment, "make_study", lambda name, *_: studies[name])
    monkeypatch.setattr(experiment, "run_experiment", run_experiment)
    monkeypatch.setattr(sys, "argv", ["experiment", "all", "--results", str(tmp_path / "results")])
    with pytest.raises(MuonlabError, match="1 of 3 experiments failed: two"):
        experiment.main()
    assert run == ["one", "three"]


def test_a_claim_is_shown_by_the_figure_it_names_or_the_first_that_draws_it():
    figures = [
        Figure("a", "traces", conditions=["x"], arms=["adamw"]),
        Figure("b", "traces", conditions=["x", "y"]),
    ]

    def shown(**sides):
        words = {"claim": "c", "source": "s", "metric": "loss", "above": 0}
        return figure_of(read_claim(words | sides, dict.fromkeys("xyz", ("adamw", "muon"))), figures)

    assert shown(condition="x", arm="muon") == "b"
    assert shown(conditions=["x"], arm="adamw") == "a"
    assert shown(condition="x", arm="muon", figure="a") == "a"
    assert shown(condition="z", arm="muon") == ""
