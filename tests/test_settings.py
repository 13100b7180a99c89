"""Types, ranges and choices are read from annotations, for our own sections and for anybody's builder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from annotated_types import MinLen
from hypothesis import given
from hypothesis import strategies as st

from muonlab.errors import MuonlabError
from muonlab.registry import Registry
from muonlab.settings.check import Average, Count, NonNegative, Positive, Share, Steps, build, settings_class


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: Positive


@dataclass(frozen=True, kw_only=True)
class Section:
    lr: NonNegative = 0.1
    layers: Count = 3
    betas: tuple[Average, Average] = (0.9, 0.95)
    kind: Literal["one", "other"] = "one"
    level: Literal["low", "high"] | None = None
    factors: Mapping[str, NonNegative] | None = None
    windows: Sequence[tuple[Steps, Steps | None]] | None = None
    share: Share = 0.5
    on: bool = False
    title: Annotated[str, MinLen(1)] = "x"
    inner: Inner = Inner(rate=1.0)
    several: Mapping[str, Inner] = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr": "fast"}, "s.lr must be a finite number of at least 0, not 'fast'"),
        ({"lr": float("nan")}, "s.lr must be a finite number of at least 0, not nan"),
        ({"lr": float("inf")}, "s.lr must be a finite number of at least 0, not inf"),
        ({"lr": True}, "s.lr must be a finite number of at least 0, not true"),
        ({"lr": None}, "s.lr must be a finite number of at least 0, not null"),
        ({"lr": [0.1]}, "s.lr must be a finite number of at least 0, not [0.1]"),
        ({"layers": 2.5}, "s.layers must be a whole number of at least 1, not 2.5"),
        ({"layers": 0}, "s.layers must be a whole number of at least 1, not 0"),
        ({"layers": "4"}, "s.layers must be a whole number of at least 1, not '4'"),
        (
            {"betas": [0.9]},
            "s.betas must be a list of 2 entries, each a number of at least 0 and below 1, not [0.9]",
        ),
        (
            {"betas": [0.9, 1.0]},
            "s.betas must be a list of 2 entries, each a number of at least 0 and below 1",
        ),
        ({"kind": "othr"}, "unknown s.kind 'othr'; did you mean 'other'? known: one, other"),
        ({"kind": 3}, "s.kind must be 'one' or 'other', not 3"),
        ({"level": "hgh"}, "unknown s.level 'hgh'; did you mean 'high'? known: high, low"),
        ({"factors": 0.1}, "s.factors must be a mapping of names to values"),
        ({"factors": {"q": -1}}, "s.factors must be a mapping of names to values"),
        ({"windows": [[0]]}, "s.windows must be a list, each entry a list of 2"),
        ({"share": 1.5}, "s.share must be a number of at least 0 and at most 1, not 1.5"),
        ({"on": "perhaps"}, "s.on must be true or false, not 'perhaps'"),
        ({"title": 2024}, "s.title must be text, not empty, not 2024"),
        ({"title": ""}, "s.title must be text, not empty, not ''"),
        ({"inner": {"rate": 0}}, "s.inner.rate must be a finite number above 0, not 0"),
        ({"inner": {}}, "s.inner.rate is missing"),
        ({"several": {"a": {"rte": 1}}}, "unknown s.several.a setting 'rte'; did you mean 'rate'"),
        ({"layrs": 3}, "unknown s setting 'layrs'; did you mean 'layers'"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_what_was_given_and_what_is_allowed(values, sentence):
    with pytest.raises(MuonlabError) as caught:
        build(Section, values, "s")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    lr=st.floats(0, 1e300) | st.integers(0, 10**6),
    layers=st.integers(1, 10**9),
    on=st.booleans(),
    windows=st.none() | st.lists(st.tuples(st.integers(0, 99), st.none() | st.integers(0, 99)), max_size=3),
)
def test_a_valid_value_is_taken_as_it_is(lr, layers, on, windows):
    lists = None if windows is None else [list(window) for window in windows]
    section = build(Section, {"lr": lr, "layers": layers, "on": on, "windows": lists}, "s")
    assert (section.lr, section.layers, section.on) == (lr, layers, on)
    assert section.windows == windows


@pytest.mark.parametrize(("word", "value"), [("no", False), ("off", False), ("yes", True), ("false", False)])
def test_yes_and_no_are_true_and_false_where_a_flag_is_meant(word, value):
    assert build(Section, {"on": word}, "s").on is value


# ---------------------------------------------------------------------- somebody's own builder
def mine(model, *, lr: NonNegative = 0.1, kind: Literal["a", "b"] = "a", steps: int = 5, free=None):
    return model, lr, kind, steps, free


def test_an_own_builder_gets_its_checks_from_its_signature():
    registry = Registry("optimizer")
    registry.register("mine")(mine)
    assert registry.settings("mine") == {"lr": 0.1, "kind": "a", "steps": 5, "free": None}
    assert registry.build("mine", {"lr": 1, "free": "anything"}, "m") == ("m", 1.0, "a", 5, "anything")
    for values, sentence in (
        ({"lr": "fast"}, "optimizer.lr must be a finite number of at least 0, not 'fast'"),
        ({"kind": "c"}, "unknown optimizer.kind 'c'"),
        ({"steps": 2.5}, "optimizer.steps must be a whole number, not 2.5"),
        ({"stps": 2}, "unknown optimizer setting 'stps'; did you mean 'steps'"),
    ):
        with pytest.raises(MuonlabError) as caught:
            registry.build("mine", values, "m")
        assert sentence in str(caught.value)


def test_a_setting_without_annotation_is_checked_by_its_default():
    section = settings_class(lambda model, *, lr=0.1, steps=5, on=True: None, "x")
    for values, sentence in (
        ({"lr": "fast"}, "o.lr must be a number, not 'fast'"),
        ({"steps": 1.5}, "o.steps must be a whole number"),
        ({"on": 3}, "o.on must be true or false"),
    ):
        with pytest.raises(MuonlabError, match=sentence):
            build(section, values, "o")


def test_what_could_not_be_checked_is_refused_when_it_is_registered():
    with pytest.raises(MuonlabError, match=r"takes \*\*settings, so its settings cannot be checked"):
        Registry("optimizer").register("mine")(lambda model, **settings: None)
    registry = Registry("optimizer")
    registry.register("mine")(mine)
    with pytest.raises(MuonlabError, match="'mine' is already registered"):
        registry.register("mine")(mine)
    with pytest.raises(MuonlabError, match="unknown optimizer 'mne'; did you mean 'mine'"):
        registry.build("mne", {})
