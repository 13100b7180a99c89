"""What a study says against its own answers: edges, seeds that came later, planned looks."""

import json
import math

import pandas as pd
import pytest
import yaml
from tiny_designs import design as make

from analysis.frames import Frames
from muonlab.errors import MuonlabError
from muonlab.study.answering import Material, Searched, write_answers
from muonlab.study.judging import added_seeds

CLAIM = {"claim": "c", "source": "s", "condition": "best", "arm": "a", "baseline": "b", "metric": "loss"}


@pytest.fixture
def asked(tmp_path):
    """asked(seeds, looks, searched, added) -> the row of the answer to whether `a` ends lower than `b`."""

    def answer(seeds=4, looks=None, searched=(), added=None):
        arms = {"a": ["optimizer=muon"], "b": ["optimizer=adamw"]}
        conditions = {
            "search": {"seeds": [100], "arms": arms, "vary": {"optimizer.lr": [0.1, 0.2]}},
            "best": {"tuned_on": "search", "arms": arms},
        }
        design = make(
            conditions, seeds=list(range(1, seeds + 1)), claims=[CLAIM | {"expect": "lower"}], looks=looks
        )
        rows = [
            {"arm": arm, "seed": seed, "loss": loss + 0.01 * (seed % 3) * (arm == "a"), "run": f"{arm}{seed}"}
            for arm, loss in (("a", 2.0), ("b", 2.04))
            for seed in range(1, seeds + 1)
        ]
        runs = pd.DataFrame(rows).assign(
            condition="best", level=math.nan, lr=0.1, status="finished", optimizer="muon"
        )
        runs["max_logit"] = runs["loss"]
        steps = runs[["run", "condition", "arm", "seed"]].assign(step=0, probe_loss=2.0)
        frames = Frames(runs, steps, pd.DataFrame(), pd.DataFrame())
        material = Material(frames, pd.DataFrame(), searched, added or {})
        [row] = write_answers("x", design, "the command", material, tmp_path).to_dict("records")
        return row

    return answer


def test_a_search_that_ended_at_an_edge_answers_nothing_but_shows_the_effect(asked):
    edge = Searched("search", "b", "search/b: best of 2 levels is 0.2, the highest tried", True)
    row = asked(searched=[edge])
    assert (row["answer"], row["why"]) == ("not testable", "the search for b ended at the edge of its range")
    assert row["effect"].startswith("loss -0.0")
    assert row["note"] == edge.text
    inside = Searched("search", "b", "inside", False)
    other = Searched("other", "b", "elsewhere", True)
    assert asked(searched=[inside, other])["answer"] == "reproduced"


def test_seeds_that_came_after_an_answer_are_named(asked):
    assert asked()["note"] == ""
    assert asked(added={"best": [3, 4]})["note"] == "seeds 3, 4 were added after a first answer"
    assert asked(added={"search": [101]})["note"] == "", "of another condition"


def test_a_planned_look_spends_its_part_of_the_error_and_needs_no_note(asked):
    row = asked(looks=[4, 8], added={"best": [3, 4]})
    assert row["note"] == ""
    assert row["p_holm"] == pytest.approx(row["p"] * 0.05 / (0.05 * math.log(1 + (math.e - 1) / 2)))


def test_added_seeds_are_found_in_what_was_judged_before(tmp_path):
    def kept(seeds, **made):
        (tmp_path / "experiment.yaml").write_text(
            yaml.safe_dump({"seeds": seeds, "conditions": {"c": {}, "own": {"seeds": [7]}}})
        )
        (tmp_path / "made.json").write_text(json.dumps(made))

    conditions = {"c": {"arms": {"a": []}}, "own": {"seeds": [7], "arms": {"a": []}}}
    design = make(conditions, seeds=[1, 2, 3])
    assert added_seeds(design, tmp_path) == {}, "nothing was judged"
    kept([1, 2])
    assert added_seeds(design, tmp_path) == {"c": [3]}
    kept([1, 2, 3], added_seeds={"c": [2]})
    assert added_seeds(design, tmp_path) == {"c": [2]}, "remembered"
    kept([4, 5])
    assert added_seeds(design, tmp_path) == {}, "other seeds are no addition"


def test_a_number_of_seeds_that_no_look_has_is_refused_before_the_runs():
    conditions = {"c": {"arms": {"a": ["optimizer=muon"]}}}
    make(conditions, seeds=[1, 2, 3], looks=[3, 6])
    with pytest.raises(
        MuonlabError, match=r"condition 'c' of .* has 2 seeds, which is none of its `looks`: 3, 6"
    ):
        make(conditions, seeds=[1, 2], looks=[3, 6])
