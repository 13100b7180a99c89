"""An experiment from its file to its answers: two stages, levels, claims, what is kept, and going on."""

import json

import pandas as pd
import pytest
import yaml

from analysis.archive import load_frames
from analysis.evidence import COLUMNS, write_evidence
from analysis.redraw import redraw
from muonlab.errors import MuonlabError
from muonlab.experiment import at_scale, check_spec
from muonlab.experiment.cells import Level
from muonlab.experiment.judging import ANSWER_COLUMNS, figure_of, judge_experiment
from muonlab.experiment.training import best_levels, train_experiment

QUICK = [
    "model=nanogpt_xxs",
    "data=synthetic",
    "data.train_tokens=20000",
    "data.val_tokens=4000",
    "model.d_model=16",
    "model.num_layers=1",
    "model.context=16",
    "trainer.batch_size=4",
    "trainer.probe_batch_size=4",
    "trainer.max_steps=40",
    "trainer.probe_every=5",
    "trainer.val_every=0",
    "schedule.warmup=2",
    "tracking=none",
]


@pytest.fixture
def spec(tmp_path):
    words = dict.fromkeys(("question", "prediction", "source", "held_equal", "tuning", "primary"), "said")
    claim = {"source": "nobody", "condition": "best", "arm": "muon"}
    given = words | {
        "minutes": 1,
        "seeds": [1, 2],
        "common": [*QUICK, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"],
        "conditions": {
            "search": {
                "seeds": [0],
                "arms": {
                    "adamw": {"overrides": ["optimizer=adamw"], "vary": {"optimizer.lr": [1e-3, 1e-9]}},
                    "muon": ["optimizer=muon"],
                },
            },
            "best": {
                "tuned_on": "search",
                "heads": True,
                "arms": {"adamw": ["optimizer=adamw"], "muon": ["optimizer=muon"]},
            },
        },
        "claims": [
            claim | {"claim": "The first", "metric": "loss", "baseline": "adamw", "expect": "lower"},
            claim
            | {
                "claim": "The second",
                "measure": {"name": "steps_to_target", "target": 0.0},
                "above": 1,
                "contradicts": "a and b",
                "sides": {"reproduced": "a"},
            },
        ],
        "figures": [{"name": "traces", "kind": "traces", "conditions": ["best"]}],
    }
    given["conditions"]["search"]["arms"]["muon"] = {
        "overrides": ["optimizer=muon"],
        "vary": {"optimizer.lr": [0.0125]},
    }
    check_spec(given)
    return at_scale(given, "cpu")


def test_an_experiment_ends_with_answers_tables_and_figures(tmp_path, capsys, spec):
    trained, tuned = train_experiment("tiny", spec, [], 2, tmp_path / "logs")
    assert [(best.arm, best.level, best.edge) for best in tuned] == [
        ("adamw", Level(0.001, ("optimizer.lr=0.001",)), "highest"),
        ("muon", Level(0.0125, ("optimizer.lr=0.0125",)), ""),
    ]
    assert "0 of 3 runs done" in capsys.readouterr().out
    assert train_experiment("tiny", spec, [], 2, tmp_path / "logs") == (trained, tuned)
    assert "7 of 7 runs done" in capsys.readouterr().out

    out = tmp_path / "results" / "tiny"
    judge_experiment("tiny", spec, trained, tuned, out, "the command")
    printed = capsys.readouterr().out
    answers = json.loads((out / "verdict.json").read_text())
    assert [list(row) for row in answers] == [ANSWER_COLUMNS] * 2
    assert set(COLUMNS) <= set(ANSWER_COLUMNS)
    assert [row["id"] for row in answers] == ["tiny-01", "tiny-02"]
    assert {(row["question"], row["command"], row["figure"], row["n"]) for row in answers} == {
        ("said", "the command", "traces", 2)
    }
    assert answers[0]["note"].startswith("search/adamw: best of 2 levels is 0.001")
    assert answers[1]["note"] == "", "muon's search had one level"
    assert (answers[1]["verdict"], answers[1]["side"]) == ("reproduced", "a")
    assert "2 never reached" in answers[1]["effect"]
    assert all(row["claim"] in printed for row in answers)

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
    assert len(made["runs"]["commits"]) == 1
    assert yaml.safe_load((out / "experiment.yaml").read_text())["seeds"] == [1, 2]
    assert pd.read_csv(out / "tuned.csv")["edge"].tolist()[0] == "highest"
    assert [path.name for path in redraw(out)] == ["traces.png"]
    page = write_evidence(tmp_path / "results").read_text()
    assert "2 claims, judged by code in 1 experiments with 7 runs" in page


def test_equal_runs_are_trained_once_and_failures_are_told_after_the_others(tmp_path, capsys, spec):
    spec["conditions"] = {
        name: {"arms": {"adamw": ["optimizer=adamw", "trainer.max_steps=4"]}} for name in ("one", "two")
    }
    spec["conditions"]["wrong"] = {"arms": {"adamw": ["optimizer=adamw", "schedule.warmup=90"]}}
    with pytest.raises(MuonlabError, match=r"2 runs failed.*schedule\.warmup=90"):
        train_experiment("tiny", spec, [], 1, tmp_path / "logs")
    printed = capsys.readouterr().out
    assert printed.count("finished") == 2
    assert "one-adamw-s1  finished" in printed
    del spec["conditions"]["wrong"]
    trained, tuned = train_experiment("tiny", spec, [], 1, tmp_path / "logs")
    assert tuned == []
    assert len({folder for _, folder in trained}) == 2


def test_the_best_level_is_the_lowest_mean_and_a_name_has_no_edge(monkeypatch):
    losses = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 2.0}
    monkeypatch.setattr("muonlab.experiment.training._loss", losses.get)

    def cell(level):
        return type("Cell", (), {"condition": "search", "arm": "muon", "level": level})()

    low, high = Level(0.1), Level(0.3)
    [best] = best_levels([(cell(low), "a"), (cell(low), "b"), (cell(high), "c")], ["search"])
    assert (best.level, best.loss, best.edge) == (low, 2.0, "lowest"), "of equal ones the first"
    names = [(cell(Level("x")), "a"), (cell(Level("y")), "b")]
    [named] = best_levels(names, ["search"])
    assert (named.level.value, named.edge) == ("y", "")
    inside = [(cell(Level(0.1)), "a"), (cell(Level(0.2)), "b"), (cell(Level(0.3)), "c")]
    assert best_levels(inside, ["search"])[0].edge == ""
    assert best_levels(inside, ["other"]) == []


def test_a_claim_is_shown_by_the_figure_it_names_or_the_first_that_draws_it():
    figures = [
        {"name": "a", "conditions": ["x"], "arms": ["adamw"]},
        {"name": "b", "conditions": ["x", "y"]},
    ]
    assert figure_of({"condition": "x", "arm": "muon"}, figures) == "b"
    assert figure_of({"conditions": ["x"], "arm": "adamw"}, figures) == "a"
    assert figure_of({"condition": "x", "arm": "muon", "figure": "a"}, figures) == "a"
    assert figure_of({"condition": "z", "arm": "muon"}, figures) == ""
