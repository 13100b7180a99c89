"""The page of all answers: rows, links, disputes, provenance, and the same bytes twice."""

import json

import pandas as pd
import pytest
import yaml

from analysis.claims import ANSWERS
from analysis.evidence import evidence, load_evidence, write_evidence
from analysis.redraw import made_by
from muonlab.errors import MuonlabError

ROW = {
    "id": "x-01",
    "claim": "Muon is faster",
    "source": "Jordan",
    "n": 5,
    "effect": "loss -0.1 [-0.2, -0.05]",
}
ROW |= {
    "answer": "reproduced",
    "own": False,
    "p": 0.001,
    "why": "",
    "headline": "",
    "contradicts": "",
    "side": "",
    "figure": "f",
    "note": "",
    "command": "make x",
}
MADE = {"command": "python -m muonlab.experiment x", "commit": "c" * 40, "dirty": False, "date": "2026-11-22"}
RUNS = {"commits": ["a" * 40, "b" * 40], "dirty": 2, "cpu": ["Some CPU"], "accelerators": []}


def keep(folder, name, rows, made=MADE | {"runs": RUNS}, runs=3):
    out = folder / name
    out.mkdir()
    spec = {"question": f"Is {name}\n true?", "figures": [{"name": "f", "kind": "traces"}]}
    spec |= {"prediction": "Yes.\n", "held_equal": "data", "tuning": "none"}
    (out / "experiment.yaml").write_text(yaml.safe_dump(spec))
    (out / "made.json").write_text(json.dumps(made))
    if rows:
        (out / "answers.json").write_text(json.dumps(rows))
        pd.DataFrame({"run": range(runs)}).to_csv(out / "runs.csv", index=False)


@pytest.fixture
def results(tmp_path):
    dispute = ROW | {"id": "a-02", "contradicts": "D3: enough?", "side": "Anson", "answer": "contradicted"}
    first = dispute | {
        "id": "a-03",
        "contradicts": "D1: why?",
        "side": "neither",
        "answer": "unresolved",
        "p": 0.3,
        "why": "a difference of 0.2 nats would have been seen",
        "n": None,
    }
    keep(tmp_path, "b", [ROW | {"note": "search/muon: best of 3; search/adamw: edge"}])
    keep(tmp_path, "a", [ROW | {"claim": "a | b"}, dispute, first])
    keep(
        tmp_path,
        "exact",
        [],
        made={"command": "python experiments/exact.py", "commit": "d" * 40, "dirty": False},
    )
    return tmp_path


def section(page, title):
    return page.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_one_row_per_claim_under_its_experiment_with_links(results):
    page = write_evidence(results).read_text()
    assert page.startswith(
        "# The evidence\n\n4 claims of papers, judged by code in 2 experiments with 6 runs: 2 reproduced, "
    )
    assert page.index("\n## a\n") < page.index("\n## b\n") < page.index("\n## exact\n")
    text = section(page, "a")
    assert text.strip().startswith("Is a true?")
    assert (
        "| a \\| b | Jordan | 5 | loss -0.1 [-0.2, -0.05] | **reproduced** | 0.0013 |  | [f](a/f.png) |"
        in text
    )
    assert text.count("| [f](a/f.png) |") == 3
    assert "Searched: search/adamw: edge." in section(page, "b")
    assert "\n\nPrediction: Yes.\n\nHeld equal: data.\n\nTuning: none.\n\n" in section(page, "b")
    assert "| claim |" not in section(page, "exact"), "an experiment without claims still has its figure"
    assert "Repeat: `python experiments/exact.py`. Figures: [f](exact/f.png)." in section(page, "exact")


def test_disputes_have_a_table_of_their_own_in_order(results):
    text = section(evidence(load_evidence(results)), "Where papers disagree")
    rows = [line for line in text.splitlines() if line.startswith("| D")]
    assert [row.split(" | ")[0] for row in rows] == ["| D1: why?", "| D3: enough?"]
    assert "| **contradicted** | 0.0013 | Anson | [f](a/f.png) |" in rows[1]
    (results / "a" / "answers.json").unlink()
    assert "Where papers disagree" not in evidence(load_evidence(results))


def test_what_trained_the_runs_is_reported(results):
    text = section(evidence(load_evidence(results)), "b")
    assert (
        "3 runs, trained at aaaaaaaaa, bbbbbbbbb, 2 with uncommitted changes; Some CPU; 2026-11-22." in text
    )
    assert made_by(MADE | {"runs": RUNS}).endswith("(commit aaaaaaaaa, bbbbbbbbb+changes).")
    assert made_by(MADE).endswith("(commit ccccccccc).")


def test_the_same_answers_give_the_same_bytes(results):
    first = write_evidence(results).read_bytes()
    assert write_evidence(results).read_bytes() == first
    assert sorted(path.name for path in results.iterdir()) == ["README.md", "a", "b", "exact"]


def test_every_answer_is_counted(results):
    page = evidence(load_evidence(results))
    counts = [int(page.partition(f" {answer}")[0].split()[-1]) for answer in ANSWERS[1:]]
    assert counts == [1, 0, 1, 0, 0]


def test_claims_of_our_own_are_listed_apart_and_not_counted(results):
    keep(results, "c", [ROW | {"claim": "Of our own", "own": True, "source": "muonlab"}])
    page = write_evidence(results).read_text()
    assert "4 claims of papers" in page
    assert "Of our own" not in section(page, "c")
    assert "| c | Of our own | muonlab | 5 |" in section(page, "Claims of muonlab's own")


def test_the_page_opens_with_what_is_known_strongest_first_and_what_is_not(results):
    keep(
        results,
        "c",
        [
            ROW | {"headline": "Weaker", "p": 0.002},
            ROW | {"headline": "Stronger.", "p": 1e-9},
            ROW
            | {"headline": "Whether so", "p": 0.2, "answer": "unresolved", "why": "0.3 would have been seen"},
        ],
    )
    page = write_evidence(results).read_text()
    known = section(page, "What we know").strip().splitlines()
    assert known == [
        "1. Stronger: loss -0.1 [-0.2, -0.05] (n = 5, [f](c/f.png)).",
        "2. Weaker: loss -0.1 [-0.2, -0.05] (n = 5, [f](c/f.png)).",
    ]
    assert section(page, "What we do not know").strip().splitlines()[0] == (
        "- Whether so: loss -0.1 [-0.2, -0.05] (n = 5, [f](c/f.png)); 0.3 would have been seen."
    )


def test_what_holds_for_several_models_is_said_once(results):
    same = [
        ROW | {"headline": f"It is so ({about})", "p": p}
        for about, p in (("a", 1e-3), ("b", 1e-9), ("a", 1e-4))
    ]
    keep(results, "c", [*same, ROW | {"headline": "It is not so (a)", "p": 1e-2}])
    known = section(write_evidence(results).read_text(), "What we know").strip().splitlines()[:2]
    assert [line.partition(":")[0] for line in known] == ["1. It is so (b; also", "2. It is not so (a)"]
    assert known[0].startswith("1. It is so (b; also: a): loss")


def test_the_readme_of_the_project_has_the_first_findings_between_its_marks(results, tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    keep(folder, "c", [ROW | {"headline": f"Finding {n}", "p": 1e-9 * n} for n in range(1, 6)])
    front = tmp_path / "README.md"
    front.write_text("Above\n<!-- findings -->\nold\n<!-- findings -->\nbelow\n")
    write_evidence(folder)
    lines = front.read_text().splitlines()
    assert (lines[0], lines[1], lines[-2], lines[-1]) == (
        "Above",
        "<!-- findings -->",
        "<!-- findings -->",
        "below",
    )
    assert [line.partition(":")[0] for line in lines[2:-2]] == [
        "1. Finding 1",
        "2. Finding 2",
        "3. Finding 3",
    ]
    assert "[f](kept/c/f.png)" in lines[2]
    front.write_text("no marks\n")
    write_evidence(folder)
    assert front.read_text() == "no marks\n"


def test_a_finding_that_is_one_of_many_is_none(results):
    """A p of 0.03 among hundreds of tests."""
    keep(
        results,
        "c",
        [
            ROW | {"p": 0.03, "contradicts": "D9", "side": "K2"},
            *[ROW | {"p": 0.5, "answer": "unresolved"}] * 90,
        ],
    )
    page = evidence(load_evidence(results))
    [row] = [line for line in section(page, "Where papers disagree").splitlines() if "| D9" in line]
    assert "**unresolved**" in row
    assert "| neither |" in row
    assert "one finding among many: q = " in section(page, "c")


def test_an_empty_folder_is_reported(tmp_path):
    with pytest.raises(MuonlabError, match="no experiment is kept"):
        load_evidence(tmp_path)


def test_claims_without_answers_are_damage_and_not_an_empty_table(results):
    path = results / "b" / "experiment.yaml"
    path.write_text(path.read_text() + "claims: [{claim: c, source: s}]\n")
    load_evidence(results)
    (results / "b" / "answers.json").unlink()
    with pytest.raises(MuonlabError, match=r"there are claims, and no answers\.json"):
        load_evidence(results)
