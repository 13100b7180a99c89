"""An experiment that asks for an optimizer is filled in with it, everywhere or with a sentence."""

from pathlib import Path

import pytest

from muonlab.errors import MuonlabError
from muonlab.experiment import make_study
from muonlab.study.answering import write_design
from muonlab.study.asking import filled
from muonlab.study.reading import read_experiment
from muonlab.study.rejudge import design_of


def test_names_and_numbers_are_filled_in():
    values = {
        "asks": {"optimizer": "muon", "lr": 0.5},
        "{optimizer}": ["optimizer={optimizer}", "{lr}", "{lr*0.3}", "{lr} and {other}", 3],
    }
    assert filled(values, {"lr": 0.1}) == {
        "asks": {"optimizer": "muon", "lr": 0.1},
        "muon": ["optimizer=muon", 0.1, 0.03, "0.1 and {other}", 3],
    }
    assert filled({"text": "{optimizer}"}, {"optimizer": "muon"}) == {"text": "{optimizer}"}


def study(*overrides):
    return make_study("compare", list(overrides), Path("studies"), 1)


def test_the_comparison_is_with_what_the_command_gives():
    made = study("optimizer=adamwclip", "data=synthetic", "optimizer.weight_decay=0.05", "scale=smoke")
    assert made.name == "compare-adamwclip-smoke"
    assert made.overrides == ("data=synthetic", "optimizer.weight_decay=0.05")
    searched = [slot for slot in made.slots() if slot.condition == "search"]
    rates = {
        arm: [slot.config.optimizer.lr for slot in searched if slot.arm == arm]
        for arm in made.design.arms_of("best")
    }
    assert list(rates) == ["adamw", "muon", "muonclip", "adamwclip"]
    assert rates["adamwclip"] == [0.0015, 0.003, 0.006, 0.012]  # about its own default
    assert {len(each) for each in rates.values()} == {4}
    assert {slot.config.optimizer.name for slot in searched if slot.arm == "adamwclip"} == {"adamwclip"}
    assert all("{" not in claim.claim for claim in made.design.all_claims())
    assert study("optimizer=adamwclip", "data=synthetic", "lr=0.1").design.asks == {
        "optimizer": "adamwclip",
        "lr": 0.1,
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "the experiment compare needs optimizer=NAME, such as optimizer=adamwclip"),
        (["optimizer=moun"], "unknown optimizer 'moun'; did you mean 'muon'"),
        (["optimizer=muon"], "the experiment has 'muon' of its own; give another"),
        (["optimizer=3"], "optimizer must be text, not 3"),
        (["optimizer=adamwclip", "lr=fast"], "lr must be a number, not 'fast'"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(overrides, said):
    with pytest.raises(MuonlabError, match=said):
        study(*overrides)


def test_only_the_comparison_asks():
    assert read_experiment("compare").asks == {"optimizer": "adamwclip", "lr": 0.003}
    assert not read_experiment("sweep").asks


def test_kept_answers_are_judged_again_by_the_filled_file(tmp_path):
    folder = tmp_path / "compare-adamwclip-smoke"
    folder.mkdir()
    write_design(study("optimizer=adamwclip", "scale=smoke", "data=synthetic").design, folder)
    claims = design_of(folder).all_claims()
    assert claims[0].claim.startswith("adamwclip learns faster than AdamW")
