"""The runs of a design: levels, what moves together, what may not be overridden, and the order."""

import pytest

from muonlab.errors import MuonlabError
from muonlab.experiment import cells, load_experiment
from muonlab.experiment.cells import Level, levels_of


def design(**section):
    return {"seeds": [1, 2], "common": ["model=nanogpt_xxs"], "conditions": {"c": section}}


def test_an_arm_may_have_levels_of_its_own():
    found = cells(
        "x",
        design(
            vary={"optimizer.lr": [0.01, 0.03]},
            arms={
                "muon": ["optimizer=muon"],
                "adamw": {"overrides": ["optimizer=adamw"], "vary": {"optimizer.lr": [0.001]}},
            },
        ),
        [],
    )
    assert [(cell.arm, cell.level.value, cell.seed) for cell in found] == [
        ("muon", 0.01, 1), ("muon", 0.03, 1), ("adamw", 0.001, 1),
        ("muon", 0.01, 2), ("muon", 0.03, 2), ("adamw", 0.001, 2),
    ]  # fmt: skip
    for cell in found:
        assert cell.config["optimizer"]["lr"] == cell.level.value
        assert cell.config["optimizer"]["name"] == cell.arm
        assert cell.config["seed"] == cell.seed
        assert cell.label == f"c-{cell.arm}-{cell.level.value:g}-s{cell.seed}"


def test_keys_that_move_together_and_levels_with_names():
    [small, large] = levels_of({"vary": {"trainer.batch_size,trainer.max_steps": [[4, 800], [8, 400]]}}, {})
    assert small == Level(4.0, ("trainer.batch_size=4", "trainer.max_steps=800"))
    assert large.value == 8.0
    named = levels_of({"levels": {"small": ["model=nanogpt_xxs"], 0.33: ["model=nanogpt_s"]}}, {})
    assert [level.value for level in named] == ["small", 0.33]
    assert [str(level) for level in named] == ["small", "0.33"]
    assert levels_of({"vary": {"optimizer.tau": [30]}}, {"levels": {"own": []}}) == [Level("own")]
    [none, number] = levels_of({"vary": {"optimizer.ns_steps": [None, 5]}}, {})
    assert (none.value, none.overrides) == ("none", ("optimizer.ns_steps=null",))
    assert (number.value, number.overrides) == (5.0, ("optimizer.ns_steps=5",))


def test_an_arms_group_wins_over_the_shared_one_and_keeps_the_shared_values():
    spec = design(
        common=["optimizer=muonclip", "optimizer.weight_decay=0.3"], arms={"adamw": ["optimizer=adamw"]}
    )
    optimizer = cells("x", spec, [])[0].config["optimizer"]
    assert (optimizer["name"], optimizer["weight_decay"]) == ("adamw", 0.3)


def test_the_windows_of_a_condition_are_those_of_its_clip():
    [cell] = cells(
        "x", design(windows=[[0, 5], [9, 12]], seeds=[1], arms={"muonclip": ["optimizer=muonclip"]}), []
    )
    assert cell.config["optimizer"]["windows"] == [[0, 5], [9, 12]]


def test_a_tuned_arm_takes_the_level_of_its_search_and_may_vary_something_else():
    spec = design(vary={"optimizer.lr": [0.01, 0.03]}, seeds=[0], arms={"muonclip": ["optimizer=muonclip"]})
    spec["conditions"]["best"] = {"tuned_on": "c", "arms": {"muonclip": ["optimizer=muonclip"]}}
    spec["conditions"]["taus"] = spec["conditions"]["best"] | {"vary": {"optimizer.tau": [10, 30]}}
    assert {cell.condition for cell in cells("x", spec, [])} == {"c"}
    chosen = {"c": {"muonclip": Level(0.03, ("optimizer.lr=0.03",))}}
    tuned = [cell for cell in cells("x", spec, [], chosen) if cell.condition != "c"]
    assert {cell.config["optimizer"]["lr"] for cell in tuned} == {0.03}
    assert [(cell.condition, cell.level.value) for cell in tuned if cell.seed == 1] == [
        ("best", 0.03), ("taus", 10.0), ("taus", 30.0),
    ]  # fmt: skip
    assert [cell.config["optimizer"]["tau"] for cell in tuned if cell.condition == "taus"][:2] == [10, 30]
    with pytest.raises(MuonlabError, match="condition 'best' varies it"):
        cells("x", spec | {"conditions": {k: v for k, v in spec["conditions"].items() if k == "best"}},
              ["optimizer.lr=1"], chosen)  # fmt: skip


@pytest.mark.parametrize(
    ("section", "overrides", "message"),
    [
        ({}, ["seed=4"], "seeds are the experiment's own"),
        (
            {"vary": {"optimizer.lr": [0.1]}},
            ["optimizer.lr=3"],
            "'optimizer.lr=3' cannot be set for every run",
        ),
        ({"vary": {"optimizer.lr": [0.1, 0.1]}}, [], "same run as another"),
        ({"vary": {"optimizer.lr": [0.1], "seed": [2]}}, [], "takes one key"),
        ({"vary": {"optimizer.lr,seed": [[0.1]]}}, [], "needs 2 values"),
        ({"vary": {"optimizer.lr": [0.1]}, "levels": {"a": []}}, [], "not both"),
        ({"vary": {"optimizer.lrr": [0.1]}}, [], "did you mean 'optimizer.lr'"),
    ],
)
def test_designs_that_are_refused(section, overrides, message):
    with pytest.raises(MuonlabError, match=message):
        cells("x", design(arms={"muon": ["optimizer=muon"]}, **section), overrides)


def test_the_ablations_arms_differ_in_nothing_that_is_held_equal():
    for cell in cells("ablation", load_experiment("ablation") | {"seeds": [1]}, []):
        assert cell.config["optimizer"]["weight_decay"] == 0.0
        assert cell.config["model"]["d_model"] == 64
        assert cell.config["tracking"]["role"] == f"{cell.condition}/{cell.arm}"
