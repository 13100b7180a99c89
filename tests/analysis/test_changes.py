"""The page of answers that differ between two folders of results."""

import json

import pytest

from analysis.changes import changes, write_changes
from muonlab.errors import MuonlabError


def keep(folder, name, **answers):
    (folder / name).mkdir(parents=True)
    rows = [{"claim": claim, "answer": answer, "why": why} for claim, (answer, why) in answers.items()]
    (folder / name / "answers.json").write_text(json.dumps(rows))


@pytest.fixture
def folders(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    keep(old, "b", same=("reproduced", ""), word=("opposite", ""), tie=("tie", ""), lost=("tie", ""))
    keep(
        new, "b", same=("reproduced", ""), word=("contradicted", ""), tie=("unresolved", "0.2 would be seen")
    )
    keep(old, "a", sure=("tie", ""))
    keep(new, "a", sure=("reproduced", ""), asked=("not testable", "too short"))
    return old, new


def test_every_answer_that_differs_has_a_reason_and_a_new_word_alone_is_no_change(folders):
    rows = changes(*folders).set_index(["experiment", "claim"])
    assert list(rows.index) == [("a", "sure"), ("a", "asked"), ("b", "tie"), ("b", "lost")]
    assert rows.loc[("b", "tie")].tolist() == ["tie", "unresolved", "0.2 would be seen"]
    assert rows.loc[("b", "lost")].tolist() == ["tie", "", "the experiment asks something else now"]
    assert rows.loc[("a", "asked")].tolist() == ["", "not testable", "asked for the first time; too short"]
    assert rows.loc[("a", "sure"), "reason"].startswith("the interval and the corrected p say so")


def test_an_experiment_that_is_gone_asks_nothing_else(folders):
    old, _ = folders
    keep(old, "c", asked=("tie", ""))
    rows = changes(*folders).set_index(["experiment", "claim"])
    assert rows.loc[("c", "asked"), "reason"] == "the experiment is not kept any more"


def test_the_page_counts_them(folders):
    text = write_changes(*folders).read_text()
    assert "3 answers of before differ or are gone, and 1 claims are new." in text
    assert "| b | tie | tie | unresolved | 0.2 would be seen |" in text


def test_a_folder_without_answers_is_reported(tmp_path):
    with pytest.raises(MuonlabError, match="no answers are kept in"):
        changes(tmp_path, tmp_path)
