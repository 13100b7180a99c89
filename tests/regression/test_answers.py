"""The committed answers, given again by today's code and experiments/ from the tables that are committed beside them.

The outcomes of the tests of single runs are taken from tests.csv.gz, and what measures need of every step from
readings.csv.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.answers import answer_all
from analysis.archive import TESTS, load_frames, read_table
from analysis.evidence import evidence, load_evidence
from muonlab.errors import MuonlabError
from muonlab.study.answering import judge_again
from muonlab.study.rejudge import design_of
from muonlab.study.rejudge import main as rejudge

RESULTS = Path(__file__).parents[2] / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/answers.json"))
WORDS = ("claim", "source", "own", "n", "unit", "answer", "why", "headline", "side", "figure", "note")
NUMBERS = ("estimate", "low", "high", "p", "p_holm", "equivalence_p")


def committed(folder):
    """The rows of answers.json."""
    return json.loads((folder / "answers.json").read_text(encoding="utf-8"))


def same(a, b):
    return a == b or (None not in (a, b) and a == pytest.approx(b, rel=1e-6, abs=1e-9))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_stored_tables_give_the_committed_answers(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / folder.name))
    judge_again(copy, design_of(folder))
    for before, now in zip(committed(folder), committed(copy), strict=True):
        assert [now[key] for key in WORDS] == [before[key] for key in WORDS]
        assert now["effect"] == before["effect"]
        assert all(same(now[key], before[key]) for key in NUMBERS), before["id"]
    for name in ("answers.txt", "answers.md", "answers.csv"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()


def test_all_claims_are_compared():
    ids = {row["id"] for folder in FOLDERS for row in committed(folder)}
    assert len(ids) > 130


def test_a_loss_that_moves_changes_an_answer():
    folder = RESULTS / "remedies"
    frames, outcomes = load_frames(folder), read_table(folder / TESTS)
    worse = frames.runs.assign(loss=frames.runs["loss"] + 0.1 * (frames.runs["arm"] == "muon"))
    claims = design_of(folder).all_claims()
    before, after = (
        answer_all(claims, frames, outcomes),
        answer_all(claims, replace(frames, runs=worse), outcomes),
    )
    assert any(a.estimate != b.estimate for a, b in zip(before, after, strict=True))
    assert any(a.answer != b.answer for a, b in zip(before, after, strict=True))


def test_the_page_of_evidence_is_what_the_answers_give():
    assert evidence(load_evidence(RESULTS)) == (RESULTS / "README.md").read_text(encoding="utf-8")


def test_answers_without_the_outcomes_that_they_rest_on_are_damage_and_not_passed_over(tmp_path, monkeypatch):
    folder = tmp_path / "boundary"
    shutil.copytree(RESULTS / "boundary", folder)
    (folder / TESTS).unlink()
    monkeypatch.setattr(sys, "argv", ["rejudge", str(folder)])
    with pytest.raises(MuonlabError, match=f"damaged: they have no {TESTS}"):
        rejudge()
