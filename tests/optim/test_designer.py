"""The minimax designer against the published tables, its guarantees, and optimality."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.errors import MuonlabError
from muonlab.optim.schedule_design import CUSHION, design_schedule, minimax_quintic
from muonlab.optim.schedules import SCHEDULES, resolve_schedule


@pytest.mark.parametrize(
    ("published", "safety", "cushion", "tolerance"),
    [
        ("polar_express", 1.0, CUSHION, 1e-12),
        ("polar_express_1.02", 1.02, 0.02, 1e-12),
        ("cans", 1.0, 0.0, 5.1e-5),
    ],
)
def test_the_designer_finds_the_published_tables(published, safety, cushion, tolerance):
    rows = SCHEDULES[published].rows[:5]
    ours = design_schedule(5, 1e-3, safety, cushion).rows
    assert (
        torch.tensor(ours, dtype=torch.float64).sub(torch.tensor(rows, dtype=torch.float64)).abs().max()
        < tolerance
    )


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 12),
    st.floats(1e-6, 0.999),
    st.sampled_from([1.0, 1.01, 1.1]),
    st.sampled_from([0.0, 0.01, CUSHION]),
)
def test_every_designed_schedule_stays_positive_and_in_its_band(steps, floor, safety, cushion):
    schedule = design_schedule(steps, floor, safety, cushion)
    assert schedule.steps == steps
    assert schedule.keeps_sign()
    low, high = schedule.band(floor)
    assert 0 < low <= 1 + 1e-12
    assert high < 2
    x = torch.logspace(-9, 0, 5000, dtype=torch.float64)
    values = schedule.scalar_map(x)
    assert (values > 0).all()
    inside = values[x >= floor]
    assert ((inside >= low) & (inside <= high)).all()


def test_one_step_beats_every_neighbour():
    # minimax: no small change of the coefficients brings the worst value closer to 1
    best = torch.tensor(minimax_quintic(0.1, 1.0), dtype=torch.float64)
    x = torch.linspace(0.1, 1, 20_001, dtype=torch.float64)
    powers = torch.stack([x, x**3, x**5])

    def worst(row: torch.Tensor) -> float:
        return (1 - row @ powers).abs().max().item()

    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        change = torch.randn(3, generator=generator, dtype=torch.float64) * 1e-2
        assert worst(best + change) > worst(best)


def test_one_step_equioscillates():
    low = 0.05
    row = minimax_quintic(low, 1.0)
    x = torch.linspace(low, 1, 200_001, dtype=torch.float64)
    error = 1 - resolve_schedule([row], 1).scalar_map(x)
    extreme = error.abs().max()
    touching = error[(error.abs() > extreme * (1 - 1e-6))].sign()
    assert touching.unique_consecutive().tolist() == [1, -1, 1, -1]


def test_more_steps_and_higher_floors_narrow_the_band():
    width = [resolve_schedule(design_schedule(steps, 1e-3)).band(1e-3) for steps in range(3, 8)]
    widths = [high - low for low, high in width]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 1e-3
    by_floor = [resolve_schedule(design_schedule(4, floor)).band(floor) for floor in (1e-3, 1e-2, 1e-1)]
    assert by_floor[0][0] < by_floor[1][0] < by_floor[2][0]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "at least 1"),
        ({"steps": 5, "floor": 0.0}, "spectral floor"),
        ({"steps": 5, "floor": 1.0}, "spectral floor"),
        ({"steps": 5, "safety": 0.9}, "safety"),
        ({"steps": 5, "cushion": 1.0}, "cushion"),
        ({"steps": 5, "floor": 1e-8, "cushion": 0.0}, "only with a cushion"),
    ],
)
def test_settings_out_of_range_are_refused(settings_, message):
    with pytest.raises(MuonlabError, match=message):
        design_schedule(**settings_)
