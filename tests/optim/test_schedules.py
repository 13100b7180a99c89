"""Named coefficient tables, their resolution to a step count, and hand-given rows."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from muonlab.errors import MuonlabError
from muonlab.optim.schedules import SCHEDULES, Schedule, list_schedules, resolve_schedule

ITERATED = [name for name in SCHEDULES if name != "svd"]
STANDARD_STEPS = {
    "jordan": 5,
    "you": 5,
    "you6": 6,
    "polar_express": 5,
    "polar_express_1.01": 5,
    "polar_express_1.02": 5,
    "polar_express_1.05": 5,
    "cans": 5,
    "aol": 4,
    "aol_dion": 4,
    "deepseek": 10,
    "cubic": 5,
    "svd": 0,
}


def test_every_name_runs_its_usual_number_of_steps():
    assert {name: resolve_schedule(name).steps for name in SCHEDULES} == STANDARD_STEPS
    assert list_schedules() == sorted([*STANDARD_STEPS, "minimax"])


@pytest.mark.parametrize("name", ITERATED)
@pytest.mark.parametrize("steps", [1, 3, 12])
def test_steps_take_the_first_rows_and_repeat_the_last(name, steps):
    table = SCHEDULES[name].rows
    assert resolve_schedule(name, steps).rows == tuple(table[min(i, len(table) - 1)] for i in range(steps))


def test_optax_defect_fewer_rows_than_steps_silently_runs_fewer():
    rows = [(3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)]
    assert resolve_schedule(rows, 4).rows == (rows[0], rows[1], rows[1], rows[1])
    assert resolve_schedule(rows).steps == 2


def test_one_triple_runs_five_times_unless_set_otherwise():
    triple = (3.4445, -4.7750, 2.0315)
    assert resolve_schedule(triple).rows == SCHEDULES["jordan"].rows
    assert resolve_schedule(triple, 3).rows == (triple,) * 3


@pytest.mark.parametrize(
    "given",
    [
        [[2, -1.5, 0.5]],
        ((2.0, -1.5, 0.5),),
        np.array([[2.0, -1.5, 0.5]]),
        OmegaConf.create([[2.0, -1.5, 0.5]]),
    ],
)
def test_rows_may_come_from_any_container(given):
    assert resolve_schedule(given).rows == ((2.0, -1.5, 0.5),)


def test_a_resolved_schedule_resolves_to_itself():
    for name in SCHEDULES:
        once = resolve_schedule(name)
        assert resolve_schedule(once) is once


@pytest.mark.parametrize(
    "given", [[], (1.0, 2.0), [(1.0, 2.0)], [(1.0, 2.0, float("nan"))], [(1.0, 2.0, "x")], 3.0, None]
)
def test_rows_that_are_no_triples_are_refused(given):
    with pytest.raises(MuonlabError, match="one triple"):
        resolve_schedule(given)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "5"])
def test_steps_that_are_no_positive_integer_are_refused(steps):
    with pytest.raises(MuonlabError, match="integer of at least 1"):
        resolve_schedule("jordan", steps)


def test_an_unknown_name_is_refused_with_the_near_ones():
    with pytest.raises(MuonlabError, match="unknown Newton-Schulz schedule 'jordon'; did you mean 'jordan'"):
        resolve_schedule("jordon")


def test_minimax_carries_its_floor_in_its_name():
    assert resolve_schedule("minimax", 4) == resolve_schedule("minimax:0.001", 4)
    assert resolve_schedule("minimax:0.1").rows != resolve_schedule("minimax").rows
    with pytest.raises(MuonlabError, match="'minimax' or"):
        resolve_schedule("minimax:wide")


@pytest.mark.parametrize("name", ITERATED)
@pytest.mark.parametrize("steps", [None, 1, 2, 5, 8])
def test_no_named_schedule_changes_sign_on_the_unit_interval(name, steps):
    assert resolve_schedule(name, steps).keeps_sign()
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:]
    assert (resolve_schedule(name, steps).scalar_map(x) > 0).all()


def test_emerging_optimizers_defect_aol_rows_reverse_a_rank_one_update():
    # the published rows without our margin: negative above 0.8837
    bare = Schedule("bare", SCHEDULES["aol"].rows, "test", row_rescaling=True)
    assert not resolve_schedule(bare).keeps_sign()
    assert resolve_schedule(bare).scalar_map(torch.tensor(1.0)) < -0.99
    assert resolve_schedule("aol").scalar_map(torch.tensor(1.0)) > 0.9


def test_damped_polar_express_rows_are_the_published_ones_rounded():
    # the four-digit table of Emerging-Optimizers for safety 1.01
    published = torch.tensor(
        [
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.8750, -1.2500, 0.3750),
        ]
    )
    ours = torch.tensor(SCHEDULES["polar_express_1.01"].rows)
    torch.testing.assert_close(ours, published, atol=1.01e-4, rtol=0)
