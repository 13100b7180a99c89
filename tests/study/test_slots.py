"""The runs of a design: levels, what moves together, what may not be overridden, and the order."""

import pytest
from tiny_designs import PUBLISHED, SPACE, WORDS, search

from muonlab.cli import compose_config, plain
from muonlab.errors import MuonlabError
from muonlab.study.reading import at_scale, load_experiment, make_design
from muonlab.study.slots import Level, check_spaces, levels_of, slots
from muonlab.train.config import read_config


def compose(overrides):
    return read_config(plain(compose_config("train", overrides)))


def design(common=("model=nanogpt_xxs",), **section):
    return make_design(
        WORDS | {"minutes": 1, "seeds": [1, 2], "common": list(common), "conditions": {"c": section}}
    )


def runs(made, overrides=(), tuned=None):
    return slots(made, compose, overrides, tuned)


def levels(section, arm):
    arms = {"a": {"overrides": ["optimizer=muon"]} | arm}
    made = design(arms=arms, **section)
    return levels_of(made, "c", "a", made.arms_of("c")["a"])


def test_an_arm_may_have_levels_of_its_own():
    found = runs(
        design(
            vary={"optimizer.lr": [0.01, 0.03]},
            arms={
                "muon": ["optimizer=muon"],
                "adamw": {"overrides": ["optimizer=adamw"], "vary": {"optimizer.lr": [0.001]}},
            },
        )
    )
    assert [slot.name for slot in found] == [
        "c/muon/0.01/s1", "c/muon/0.03/s1", "c/adamw/0.001/s1",
        "c/muon/0.01/s2", "c/muon/0.03/s2", "c/adamw/0.001/s2",
    ]  # fmt: skip
    for slot in found:
        assert slot.config.optimizer.lr == slot.level.value
        assert slot.config.optimizer.name == slot.arm
        assert slot.config.seed == slot.seed
        assert slot.label == slot.name.replace("/", "-")


def test_keys_that_move_together_and_levels_with_names():
    [small, large] = levels({"vary": {"trainer.batch_size,trainer.max_steps": [[4, 800], [8, 400]]}}, {})
    assert small == Level(4.0, ("trainer.batch_size=4", "trainer.max_steps=800"))
    assert large.value == 8.0
    named = levels({"levels": {"small": ["model=nanogpt_xxs"], 0.33: ["model=nanogpt_s"]}}, {})
    assert [level.value for level in named] == ["small", 0.33]
    assert [str(level) for level in named] == ["small", "0.33"]
    assert levels({"vary": {"optimizer.tau": [30]}}, {"levels": {"own": []}}) == [Level("own")]
    [none, number] = levels({"vary": {"optimizer.ns_steps": [None, 5]}}, {})
    assert (none.value, none.overrides) == ("none", ("optimizer.ns_steps=null",))
    assert (number.value, number.overrides) == (5.0, ("optimizer.ns_steps=5",))


def test_several_keys_are_every_combination_and_keys_that_move_together_one():
    made = design(
        vary={"optimizer.lr": [0.01, 0.03], "optimizer.tau,optimizer.alpha": [[10, 0.5], [30, 0.6]]},
        arms={"muonclip": ["optimizer=muonclip"]},
        seeds=[1],
    )
    found = runs(made)
    assert [str(slot.level) for slot in found] == ["0.01 10", "0.01 30", "0.03 10", "0.03 30"]
    settings = [slot.config.optimizer for slot in found]
    assert [(each.lr, each.tau, each.alpha) for each in settings][1:3] == [(0.01, 30, 0.6), (0.03, 10, 0.5)]


def test_an_arms_group_wins_over_the_shared_one_and_keeps_the_shared_values():
    common = ["optimizer=muonclip", "optimizer.weight_decay=0.3"]
    optimizer = runs(design(common, arms={"adamw": ["optimizer=adamw"]}))[0].config.optimizer
    assert (optimizer.name, optimizer.weight_decay) == ("adamw", 0.3)


def test_the_windows_of_a_condition_are_those_of_its_clip():
    [slot] = runs(design(windows=[[0, 5], [9, 12]], seeds=[1], arms={"muonclip": ["optimizer=muonclip"]}))
    assert slot.config.as_dict()["optimizer"]["windows"] == [[0, 5], [9, 12]]


def test_a_tuned_arm_takes_the_level_of_its_search_and_may_vary_something_else():
    arms = {"muonclip": ["optimizer=muonclip"]}
    conditions = {
        "c": {"vary": {"optimizer.lr": [0.01, 0.03]}, "seeds": [0], "arms": arms},
        "best": {"tuned_on": "c", "arms": arms},
        "taus": {"tuned_on": "c", "arms": arms, "vary": {"optimizer.tau": [10, 30]}},
    }
    made = make_design(WORDS | {"minutes": 1, "seeds": [1, 2], "conditions": conditions})
    assert {slot.condition for slot in runs(made)} == {"c"}
    chosen = {"c": {"muonclip": Level(0.03, ("optimizer.lr=0.03",))}}
    tuned = [slot for slot in runs(made, tuned=chosen) if slot.condition != "c"]
    assert {slot.config.optimizer.lr for slot in tuned} == {0.03}
    assert [slot.name for slot in tuned if slot.seed == 1] == [
        "best/muonclip/0.03/s1", "taus/muonclip/10/s1", "taus/muonclip/30/s1",
    ]  # fmt: skip
    assert [slot.config.optimizer.tau for slot in tuned if slot.condition == "taus"][:2] == [10, 30]
    with pytest.raises(MuonlabError, match=r"condition '(c|best)' varies it"):
        runs(made, ["optimizer.lr=1"], chosen)


@pytest.mark.parametrize(
    ("section", "overrides", "message"),
    [
        ({}, ["seed=4"], "seed cannot be set for every run"),
        ({}, ["+seed=4"], "seed cannot be set for every run"),
        (
            {"vary": {"optimizer.lr": [0.1]}},
            ["optimizer.lr=3"],
            "'optimizer.lr=3' cannot be set for every run",
        ),
        ({"vary": {"optimizer.lr": [0.1, 0.1]}}, [], "same run as another"),
        ({"vary": {"optimizer.lr": [0.1], "seed": [2]}}, [], "seeds are the experiment's own"),
        ({"vary": {"optimizer.lr,seed": [[0.1]]}}, [], "needs 2 values"),
        ({"vary": {"optimizer.lr": [0.1]}, "levels": {"a": []}}, [], "not both"),
        ({"vary": {"optimizer.lrr": [0.1]}}, [], "did you mean 'optimizer.lr'"),
        ({"vary": {"optimizer.lr": ["fast"]}}, [], "optimizer.lr must be a finite number"),
    ],
)
def test_designs_that_are_refused(section, overrides, message):
    with pytest.raises(MuonlabError, match=message):
        runs(design(arms={"muon": ["optimizer=muon"]}, **section), overrides)


def test_a_search_without_arms_has_one_for_each_of_its_optimizers():
    made = design(search=search(trials=3), seeds=[0])
    found = runs(made)
    assert [slot.name for slot in found] == ["c/muon/published/s0", "c/muon/1/s0", "c/muon/2/s0"]
    assert found[0].level.setting == PUBLISHED
    assert [slot.config.optimizer.lr for slot in found] == [slot.level.setting["lr"] for slot in found]
    assert not any(slot.drawn for slot in found)


def test_every_optimizer_gets_the_same_points_and_an_adaptive_sampler_none_beforehand():
    two = {name: {"published": PUBLISHED, "space": SPACE} for name in ("muon", "muonclip")}
    found = runs(design(search=search(**two), seeds=[0]))
    settings = {arm: [s.level.setting for s in found if s.arm == arm] for arm in two}
    assert settings["muon"] == settings["muonclip"]
    adaptive = runs(design(search=search("tpe"), seeds=[0]))
    assert [slot.drawn for slot in adaptive] == [False, True, True, True]
    drawn = adaptive[1].at({"lr": 0.5, "weight_decay": 0.25})
    assert (drawn.config.optimizer.lr, drawn.name) == (0.5, "c/muon/1/s0")
    with pytest.raises(MuonlabError, match=r"optimizer\.lr must be a finite number of at least 0"):
        adaptive[1].at({"lr": -1.0, "weight_decay": 0.25})


def test_the_ends_of_a_space_are_checked_before_anything_runs():
    space = {"ns_schedule": "choice(jordan, jordn)"}
    optimizers = {"muon": {"published": {"ns_schedule": "jordan"}, "space": space}}
    made = design(search=search("tpe", **optimizers), seeds=[0])
    with pytest.raises(MuonlabError, match="did you mean 'jordan'"):
        check_spaces(made, compose)


def test_the_ablations_arms_differ_in_nothing_that_is_held_equal():
    from dataclasses import replace

    made = replace(at_scale(load_experiment("ablation"), "cpu"), seeds=[1])
    for slot in runs(made):
        assert slot.config.optimizer.weight_decay == 0.0
        assert slot.config.model.d_model == 32
