"""Search spaces in Hydra's syntax, and the points that every optimizer gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from muonlab.errors import MuonlabError
from muonlab.study.space import at, containing, edge, parse_space, quasi_random

LOG = FloatDistribution(1e-4, 1.0, log=True)


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("tag(log, interval(1e-4, 1.0))", LOG),
        ("interval(0.5, 2)", FloatDistribution(0.5, 2.0)),
        ("choice(jordan, you)", CategoricalDistribution(["jordan", "you"])),
        ("choice(1, 2.5)", CategoricalDistribution([1, 2.5])),
        ("range(3, 9, 2)", IntDistribution(3, 7, step=2)),
        ("int(interval(1, 64))", IntDistribution(1, 64)),
    ],
)
def test_hydras_syntax_becomes_optunas_distributions(text, distribution):
    assert parse_space({"x": text}) == {"x": distribution}


@pytest.mark.parametrize(
    "text",
    [
        "0.1",
        "interval(2, 1)",
        "tag(log, interval(0, 1))",
        "interval(1",
        "range(10, 1)",
        "range(0.5, 3)",
        "interval(0.1, inf)",
        "interval(1e-400, 1.0)",
    ],
)
def test_what_is_no_space_is_refused_in_one_sentence(text):
    with pytest.raises(MuonlabError, match="search space of lr") as caught:
        parse_space({"lr": text})
    assert "\n" not in str(caught.value)


@given(u=st.floats(0, 1, exclude_max=True))
def test_quantiles_stay_in_their_range(u):
    assert 1e-4 <= at(LOG, u) <= 1.0
    assert at(IntDistribution(3, 7, step=2), u) in (3, 5, 7)
    assert 1 <= at(IntDistribution(1, 64, log=True), u) <= 64
    assert at(CategoricalDistribution(["a", "b"]), u) == ("a" if u < 0.5 else "b")


def test_the_middle_of_a_log_scale_is_the_geometric_mean():
    assert at(LOG, 0.5) == pytest.approx(1e-2)


def test_more_points_begin_with_the_same_ones_and_other_spaces_get_the_same_cube():
    space = {"lr": LOG, "weight_decay": FloatDistribution(0.0, 1.0)}
    few, many = quasi_random(space, 4, seed=0), quasi_random(space, 9, seed=0)
    assert many[:4] == few
    assert quasi_random(space, 4, seed=1) != few
    shifted = {"lr": FloatDistribution(1e-2, 1e2, log=True), "weight_decay": FloatDistribution(0.0, 1.0)}
    for ours, theirs in zip(few, quasi_random(shifted, 4, seed=0), strict=True):
        assert theirs["lr"] == pytest.approx(100 * ours["lr"])
        assert theirs["weight_decay"] == ours["weight_decay"]


@pytest.mark.parametrize(
    ("value", "low", "high", "log", "where"),
    [
        (1.1e-4, 1e-4, 1.0, True, "lowest"),
        (1e-2, 1e-4, 1.0, True, ""),
        (0.9, 1e-4, 1.0, True, "highest"),
        (0.04, 0.0, 1.0, False, "lowest"),
        (1.0, 1.0, 1.0, False, ""),
        ("a", "a", "b", False, ""),
        (True, False, True, False, ""),
    ],
)
def test_one_rule_says_what_lies_at_the_edge(value, low, high, log, where):
    assert edge(value, low, high, log) == where


def test_a_published_setting_outside_its_space_widens_what_is_recorded():
    assert containing(LOG, 3.0) == FloatDistribution(1e-4, 3.0, log=True)
    assert containing(IntDistribution(3, 7), 9) == IntDistribution(3, 9)
    assert containing(CategoricalDistribution(["a"]), "b") == CategoricalDistribution(["a", "b"])


@pytest.mark.parametrize(
    ("space", "value"), [(LOG, "high"), (LOG, -1.0), (LOG, True), (IntDistribution(1, 5), 2.5)]
)
def test_a_published_setting_that_no_space_could_hold_is_refused(space, value):
    with pytest.raises(MuonlabError, match="published setting must be"):
        containing(space, value)
