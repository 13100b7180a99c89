"""Ranges that grow where a best level is at their edge, for all arms alike; and multiples of what was found."""

from dataclasses import replace

import pytest

from muonlab.errors import MuonlabError
from muonlab.study.tuning import Best, extended, levels_by_arm, with_ranges

ADAMW = {
    "overrides": ["optimizer=adamw"],
    "vary": {"optimizer.lr": [0.001, 0.002], "optimizer.other_lr": [0.01, 0.03]},
}
MUON = {
    "overrides": ["optimizer=muon"],
    "vary": {"optimizer.lr": [0.01, 0.02], "optimizer.adamw_lr": [0.01, 0.03]},
}
ARMS = {"adamw": ["optimizer=adamw"], "muon": ["optimizer=muon"]}


@pytest.fixture
def searched(study, monkeypatch):
    """searched(loss, **search) -> with_ranges of a study whose runs end at loss(arm, lr, other rate), untrained."""
    monkeypatch.setattr("muonlab.study.tuning.load_run", lambda slot: slot)

    def ask(loss, times=None, **search):
        monkeypatch.setattr(
            "muonlab.study.tuning.objective", lambda slot: loss(slot.arm, *slot.level.axes.values())
        )
        tuned = {"tuned_on": "search", "arms": ARMS} | ({"times": times} if times else {})
        arms = {"adamw": ADAMW, "muon": MUON}
        made = study({"search": {"seeds": [0], "arms": arms} | search, "best": tuned})
        return with_ranges(made, lambda grown: [(slot, slot) for slot in grown.slots()])

    return ask


def test_an_edge_of_one_arm_gives_every_arm_as_many_levels_more(searched):
    """Muon's matrices want 0.07, AdamW's 0.001 or less."""
    turns = {
        "adamw": lambda lr, other: (lr - 0.0005) ** 2 + other * 1e-9,
        "muon": lambda lr, other: (lr - 0.07) ** 2 + other * 1e-9,
    }
    grown, trained, found = searched(lambda arm, *rates: turns[arm](*rates), extend=2)
    best = {each.arm: each for each in found}
    assert {arm: each.tried for arm, each in best.items()} == {"adamw": 24, "muon": 24}
    assert best["muon"].level.axes == {"optimizer.lr": 0.08, "optimizer.adamw_lr": 0.00111111}
    assert best["adamw"].level.axes["optimizer.lr"] == 0.0005, "inside by now"
    assert {each.extended for each in found} == {2}
    assert "optimizer.lr: highest" in best["muon"].edge
    assert best["adamw"].edge == "optimizer.other_lr: lowest"
    assert str(best["muon"]).endswith("tried: a better one may lie beyond")
    assert "the ranges extended 2x" in str(best["muon"])
    assert len(trained) == 48
    assert grown.design.conditions["search"].extend == 0


def test_nothing_grows_without_an_edge_or_without_leave(searched):
    valley = {"adamw": 0.0015, "muon": 0.0141}
    _, _, inside = searched(lambda arm, lr, other: abs(lr - valley[arm]) + abs(other - 0.02), extend=3)
    assert {each.extended for each in inside} == {1}, "of two values both are edges"
    assert [each.edge for each in inside] == ["", ""]
    _, _, edges = searched(lambda arm, lr, other: lr)
    assert {each.extended for each in edges} == {0}
    assert all(each.edge for each in edges)


def test_the_same_runs_give_the_same_ranges(searched):
    def loss(arm, lr, other):
        return -lr + other

    first, second = searched(loss, extend=2), searched(loss, extend=2)
    assert first[0].design == second[0].design
    assert [slot.name for slot, _ in first[1]] == [slot.name for slot, _ in second[1]]


def test_each_search_counts_its_own_extensions(study, monkeypatch):
    monkeypatch.setattr("muonlab.study.tuning.load_run", lambda slot: slot)
    monkeypatch.setattr(
        "muonlab.study.tuning.objective",
        lambda slot: slot.level.value if slot.condition == "low" else abs(slot.level.value - 0.02),
    )
    section = {"seeds": [0], "extend": 2, "vary": {"optimizer.lr": [0.01, 0.02, 0.04]}}
    arms = {"muon": ["optimizer=muon"]}
    conditions = {name: section | {"arms": arms} for name in ("low", "inside")}
    conditions |= {f"best_{name}": {"tuned_on": name, "arms": arms} for name in ("low", "inside")}
    _, _, found = with_ranges(study(conditions), lambda grown: [(slot, slot) for slot in grown.slots()])
    assert {each.condition: (each.extended, each.tried) for each in found} == {
        "low": (2, 5),
        "inside": (0, 3),
    }


def test_where_runs_are_missing_nothing_is_said(study):
    made = study({"search": {"seeds": [0], "arms": {"muon": MUON}, "extend": 1}})
    assert with_ranges(made, lambda grown: None) is None


@pytest.mark.parametrize(
    ("values", "side", "grown"),
    [
        ([1, 2, 4], "highest", [1, 2, 4, 8]),
        ([1, 2, 4], "lowest", [0.5, 1, 2, 4]),
        ([0, 1], "highest", [0, 1, 2]),
        ([4, 1, 2], "lowest", [0.5, 1, 2, 4]),
        ([0.001, 0.003], "highest", [0.001, 0.003, 0.009]),
    ],
)
def test_a_step_is_a_factor_where_it_can_be(study, values, side, grown):
    arms = {"muon": {"overrides": ["optimizer=muon"], "vary": {"optimizer.lr": values}}}
    design = study(
        {"search": {"seeds": [0], "arms": arms, "extend": 1}, "best": {"tuned_on": "search"}}
    ).design
    best = Best("search", "muon", None, 2.0, 3, side, ((0, side),))
    assert extended(design, [best]).conditions["search"].arms["muon"]["vary"]["optimizer.lr"] == grown
    assert extended(replace(design), [replace(best, sides=())]) is None


def test_multiples_are_of_what_each_arm_was_tuned_to(searched):
    best = {"adamw": 0.002, "muon": 0.01}
    grown, _, found = searched(
        lambda arm, lr, other: abs(lr - best[arm]) + other, times={"optimizer.lr": [1, 4]}
    )
    slots = [
        slot for slot in grown.slots(levels_by_arm(found)) if slot.condition == "best" and slot.seed == 1
    ]
    rates = {(slot.arm, slot.level.value): slot.config.optimizer.lr for slot in slots}
    assert rates == {("adamw", 1.0): 0.002, ("adamw", 4.0): 0.008, ("muon", 1.0): 0.01, ("muon", 4.0): 0.04}
    assert {slot.config.optimizer.other_lr for slot in slots if slot.arm == "adamw"} == {0.01}
    assert {slot.config.optimizer.adamw_lr for slot in slots if slot.arm == "muon"} == {0.01}


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"times": {"optimizer.lr": [2]}, "arms": ARMS}, "no levels"),
        ({"tuned_on": "search", "times": {"optimizer.lr": [2]}, "vary": {"seed": [1]}}, "no levels"),
        (
            {"tuned_on": "search", "times": {"optimizer.lr": [2], "optimizer.tau": [2]}},
            "takes one key, not 2",
        ),
        ({"tuned_on": "search", "times": {"optimizer.lr": [0]}}, "must be"),
        ({"tuned_on": "search", "times": {"optimizer.lr": []}}, "must"),
    ],
)
def test_multiples_that_mean_nothing_are_refused(study, condition, message):
    search = {"seeds": [0], "arms": {"adamw": ADAMW, "muon": MUON}}
    with pytest.raises(MuonlabError, match=message):
        study({"search": search, "best": condition})


def test_multiples_of_what_was_not_varied_are_refused(searched):
    grown, _, found = searched(lambda arm, lr, other: lr, times={"optimizer.weight_decay": [2]})
    with pytest.raises(
        MuonlabError, match=r"multiplies optimizer\.weight_decay, which search does not vary for adamw"
    ):
        grown.slots(levels_by_arm(found))


def test_a_multiple_of_a_word_is_refused(searched):
    arms = {
        arm: {"overrides": own, "vary": {"model.activation": ["gelu", "relu2"]}} for arm, own in ARMS.items()
    }
    grown, _, found = searched(lambda arm, word: len(word), arms=arms, times={"model.activation": [2]})
    with pytest.raises(MuonlabError, match="whose best value is 'gelu' and not a number"):
        grown.slots(levels_by_arm(found))
