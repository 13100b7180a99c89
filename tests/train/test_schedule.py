"""Learning-rate factors at the steps where they are known."""

import pytest

from muonlab.errors import MuonlabError
from muonlab.train.schedule import SCHEDULES, build_schedule


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_warm_up_is_linear_and_the_peak_is_one(name):
    factor = build_schedule(name, 100, warmup=10)
    warm = factor(10)  # 1, but for a ramp, which only begins there
    assert [factor(step) for step in range(10)] == pytest.approx([warm * (s + 1) / 10 for s in range(10)])
    assert all(0 <= factor(step) <= 1 for step in range(100))
    assert max(factor(step) for step in range(100)) == 1.0
    assert build_schedule(name, 100, warmup=0)(0) == warm


def test_constant_stays():
    assert build_schedule("constant", 100, warmup=10)(99) == 1.0


def test_ramp_grows_by_the_same_factor_every_step():
    factor = build_schedule("ramp", 121, warmup=20, start=1 / 16)
    assert factor(20) == 1 / 16
    assert factor(70) == pytest.approx(1 / 4)
    assert factor(120) == 1.0


def test_cosine_ends_at_its_final_value_and_is_halfway_in_the_middle():
    factor = build_schedule("cosine", 101, warmup=0, final=0.2)
    assert factor(100) == pytest.approx(0.2)
    assert factor(50) == pytest.approx(0.6)


def test_wsd_decays_linearly_over_its_share():
    factor = build_schedule("wsd", 100, warmup=10, decay=0.2, final=0.0)
    assert factor(79) == 1.0
    assert factor(89) == pytest.approx(0.5)
    assert factor(99) == 0.0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("linear", {}, "unknown schedule 'linear'"),
        ("cosine", {"decay": 0.1}, "unknown schedule setting 'decay'"),
        ("constant", {"warmup": 0.1}, r"schedule\.warmup must be a whole number of at least 0, not 0\.1"),
        ("cosine", {"final": 1.5}, r"schedule\.final must be a number of at least 0 and at most 1"),
        ("ramp", {"start": 0.0}, r"schedule\.start must be a number above 0 and at most 1"),
        ("wsd", {"decay": 0.0}, r"schedule\.decay must be a number above 0 and at most 1"),
    ],
)
def test_wrong_settings_are_errors(name, settings, message):
    with pytest.raises(MuonlabError, match=message):
        build_schedule(name, 100, **settings)
