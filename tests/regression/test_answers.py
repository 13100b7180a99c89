"""The committed answers, given again by today's code from the tables that are committed beside them.

What is stored is enough for 132 of the 137 claims: the same words, and the same numbers to the six decimals that
answers.json keeps. Five rest on every step of a trace (`EVERY_STEP`), of which results/ keeps bins: their numbers
differ, and their answer alone is compared. The outcomes of the tests of single runs are taken from tests.csv, since
they were judged on every step and head.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from analysis.answers import answer_all
from analysis.archive import load_frames
from analysis.claims import read_claim
from analysis.evidence import evidence, load_evidence
from analysis.tables import save_table

RESULTS = Path(__file__).parents[2] / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/answers.json"))
# The claims whose numbers need the traces before they were thinned out, and what they read there.
EVERY_STEP = {
    "batch_size-02": "the step, interpolated between readings, at which a loss is reached",
    "spike_ladder-05": "the deviation of neighbouring steps",
    "spike_ladder-14": "the running minimum over windows of 25 steps",
    "spike_ladder-16": "the loss at steps 250 and 310",
    "spike_ladder-17": "the loss at steps 310 and 390",
}
ALWAYS = ("claim", "source", "arm", "conditions", "n", "unit", "answer", "contradicts", "side")
NUMBERS = ("estimate", "low", "high", "floor", "p", "p_holm")


def claims_of(folder, spec):
    """The claims of an experiment's file in the order of their answers: `claims`, then a claim per `harmless` pair."""
    pairs = [
        {"claim": f"The clip is harmless at a {pair['condition']} learning rate", "source": "K2 App. D"}
        | {key: value for key, value in pair.items() if key != "baseline"}
        | {"harmless": pair["baseline"]}
        for pair in spec.get("harmless", ())
    ]
    conditions = pd.read_csv(folder / "runs.csv").groupby("condition")["arm"].agg(set).to_dict()
    return [read_claim(claim, conditions) for claim in (*spec.get("claims", ()), *pairs)]


def committed(folder):
    """The rows of answers.json."""
    return json.loads((folder / "answers.json").read_text(encoding="utf-8"))


def answered(folder, change=lambda frames: frames):
    """Rows like `committed`, answered now from the stored tables; `change` is applied to the frames before."""
    spec = yaml.safe_load((folder / "experiment.yaml").read_text(encoding="utf-8"))
    outcomes = pd.read_csv(folder / "tests.csv")
    answers = answer_all(claims_of(folder, spec), change(load_frames(folder)), outcomes)
    return [{key: _as_json(value) for key, value in vars(answer).items()} for answer in answers]


def _as_json(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def same_number(a, b):
    """Whether two numbers agree to six decimals, or to the seven digits of the single precision of the tables."""
    return a == b or (None not in (a, b) and math.isclose(a, b, rel_tol=1e-7, abs_tol=1.5e-6))


def changed(before, now):
    """The keys by which two answers to one claim differ: answer, numbers and words."""
    keys = [key for key in (*ALWAYS, "effect") if before[key] != now[key]]
    return keys + [key for key in NUMBERS if not same_number(before[key], now[key])]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_stored_tables_give_the_committed_answers(folder):
    for before, now in zip(committed(folder), answered(folder), strict=True):
        different = changed(before, now)
        assert not set(different) & set(ALWAYS), (before["id"], different)
        assert bool(different) == (before["id"] in EVERY_STEP), (before["id"], different)


def test_all_claims_are_compared():
    ids = [row["id"] for folder in FOLDERS for row in committed(folder)]
    assert len(ids) == 137
    assert set(EVERY_STEP) <= set(ids)


@pytest.mark.parametrize(("nats", "seen"), [(1e-4, {"estimate", "low", "high"}), (0.1, {"answer"})])
def test_a_loss_that_moves_changes_an_answer(nats, seen):
    def worse(frames):
        muon = frames.runs["arm"] == "muon"
        return replace(frames, runs=frames.runs.assign(loss=frames.runs["loss"] + nats * muon))

    folder = RESULTS / "arms"
    found = [changed(*rows) for rows in zip(committed(folder), answered(folder, worse), strict=True)]
    assert any(seen <= set(keys) for keys in found)


def test_the_page_of_evidence_is_what_the_answers_give():
    assert evidence(load_evidence(RESULTS)) == (RESULTS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_of_answers_are_what_the_answers_give(folder, tmp_path):
    answers = pd.DataFrame(committed(folder))
    shown = ["claim", "source", "n", "effect", "answer", *(c for c in ("side", "note") if answers[c].any())]
    for path in save_table(answers[shown], tmp_path, "answers").values():
        assert path.read_text(encoding="utf-8") == (folder / path.name).read_text(encoding="utf-8")
