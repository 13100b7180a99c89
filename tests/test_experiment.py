"""An experiment from its file to its answers."""

import json

import pandas as pd
import pytest
import yaml

from analysis.claims import OPPOSITE
from analysis.compose import KINDS
from muonlab.cli import project_folder
from muonlab.errors import MuonlabError
from muonlab.experiment import cells, load_experiment
from muonlab.experiment.judging import judge_and_draw
from muonlab.experiment.training import train_cells

NAMES = sorted(path.stem for path in project_folder("experiments").glob("*.yaml"))
QUICK = [
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
    "schedule.warmup=2",
    "tracking=none",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_file_composes_and_refers_only_to_what_it_has(name):
    spec = load_experiment(name)
    found = cells(name, spec, [])
    designed = {(c, arm) for c, section in spec["conditions"].items() for arm in section["arms"]}
    assert len(found) == len(designed) * len(spec["seeds"])
    for claim in spec["claims"]:
        assert (claim["condition"], claim["arm"]) in designed
        if "baseline" in claim:
            assert (claim["condition"], claim["baseline"]) in designed
            assert claim["expect"] in OPPOSITE
    for figure in spec["figures"]:
        assert figure["kind"] in KINDS
        assert set(figure.get("conditions", ())) <= set(spec["conditions"])
    for key in ("question", "prediction", "source", "held_equal", "tuning", "primary", "minutes"):
        assert spec[key]


def test_arms_differ_in_nothing_that_is_held_equal():
    for cell in cells("ablation", load_experiment("ablation"), []):
        assert cell.config["optimizer"]["weight_decay"] == 0.0
        assert cell.config["model"]["d_model"] == 64
        assert cell.config["tracking"]["role"] == f"{cell.condition}/{cell.arm}"


def test_a_misspelt_experiment_and_a_seed_are_refused():
    with pytest.raises(MuonlabError, match="did you mean 'ablation'"):
        load_experiment("ablatoin")
    with pytest.raises(MuonlabError, match="seeds are the experiment's own"):
        cells("ablation", load_experiment("ablation"), ["seed=4"])


def test_an_experiment_ends_with_answers_tables_and_figures(tmp_path, capsys):
    spec = load_experiment("ablation")
    spec["seeds"] = [1, 2]
    del spec["conditions"]["mild"]
    spec["claims"] = [claim for claim in spec["claims"] if claim["condition"] != "mild"]
    spec["figures"] = [f for f in spec["figures"] if "mild" not in f["conditions"]]
    spec["harmless"] = []
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    todo = cells("ablation", spec, [*QUICK, *paths])
    trained = train_cells(todo, 2, tmp_path / "logs")
    assert train_cells(todo, 2, tmp_path / "logs") == trained
    assert f"{len(todo)} of {len(todo)} runs done" in capsys.readouterr().out
    out = tmp_path / "results"
    judge_and_draw("ablation", spec, trained, [], out, "the command")
    printed = capsys.readouterr().out
    answers = json.loads((out / "verdict.json").read_text())
    assert [row["claim"] for row in answers] == [claim["claim"] for claim in spec["claims"]]
    assert {row["verdict"] for row in answers} <= {
        "reproduced",
        "not reproduced",
        "opposite",
        "tie",
        "not testable",
    }
    assert all(row["claim"] in printed for row in answers)
    assert len(pd.read_csv(out / "runs.csv")) == len(todo)
    assert json.loads((out / "made.json").read_text())["command"] == "the command"
    assert yaml.safe_load((out / "experiment.yaml").read_text())["seeds"] == [1, 2]
    for figure in spec["figures"]:
        assert (out / f"{figure['name']}.pdf").stat().st_size > 5000
