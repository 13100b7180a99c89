"""The exact band, the sign proof and the report of a schedule, against dense sampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.errors import MuonlabError
from muonlab.optim.bands import band, describe_schedule, flops, image, keeps_sign, scalar_map
from muonlab.optim.schedules import SCHEDULES

coefficients = st.floats(-5, 5, allow_subnormal=False)
rows = st.tuples(coefficients, coefficients, coefficients)


def dense(floor: float) -> torch.Tensor:
    return torch.linspace(floor, 1, 200_001, dtype=torch.float64)


# Re-measured from the rows over [0.01, 1]; algorithms.md 1.1 lists the same to three digits.
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("jordan", 0.6818, 1.1344),
        ("you", 0.9778, 1.0318),
        ("you6", 0.9956, 0.9993),
        ("polar_express_1.01", 0.8703, 1.1236),
        ("polar_express_1.02", 0.8589, 1.1411),
        ("polar_express_1.05", 0.8461, 1.1236),
        ("cans", 0.8844, 1.1198),
        ("cubic", 0.7741, 1.3000),
        ("deepseek", 1.0, 1.0005),
        ("svd", 1.0, 1.0),
    ],
)
def test_bands_of_the_published_tables(name, low, high):
    assert band(name, 0.01) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "svd"])
@pytest.mark.parametrize("floor", [1e-3, 0.3])
def test_band_is_what_dense_sampling_finds(name, floor):
    values = scalar_map(name, dense(floor))
    low, high = band(name, floor)
    assert low <= values.min() + 1e-12
    assert high >= values.max() - 1e-12
    # and no wider: the samples come close to both ends
    assert values.min() - low < 1e-3
    assert high - values.max() < 1e-3


@settings(max_examples=60, deadline=None)
@given(rows, st.floats(0.0, 0.99), st.floats(0.01, 2.0))
def test_image_is_what_dense_sampling_finds(row, start, width):
    x = torch.linspace(start, start + width, 20_001, dtype=torch.float64)
    a, b, c = row
    values = a * x + b * x**3 + c * x**5
    low, high = image(row, start, start + width)
    scale = 1 + max(abs(low), abs(high))
    assert low <= values.min() + 1e-12 * scale
    assert high >= values.max() - 1e-12 * scale
    # a smooth extremum is missed by at most the second derivative times the squared spacing
    assert values.min() - low < 1e-4 * scale
    assert high - values.max() < 1e-4 * scale


@settings(max_examples=100, deadline=None)
@given(st.lists(rows, min_size=1, max_size=3))
def test_a_schedule_found_safe_has_only_positive_samples(table):
    if keeps_sign(table, len(table)):
        assert (scalar_map(table, dense(1e-4), len(table)) >= 0).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(rows, min_size=1, max_size=3))
def test_a_schedule_found_unsafe_reaches_zero(table):
    if not keeps_sign(table, len(table)):
        assert band(table, 1e-9, len(table))[0] <= 1e-6


def test_flops_count_the_products():
    # one step: X Xᵀ and B X are 2 n² m each, the square of A 2 n³
    assert flops("jordan", 3, 7, 1) == 4 * 9 * 7 + 2 * 27
    assert flops("jordan", 7, 3) == 5 * flops("jordan", 3, 7, 1)
    assert flops("cubic", 3, 7, 1) == 4 * 9 * 7


def test_the_report_says_what_the_schedule_does():
    report = describe_schedule("jordan", floor=0.001, shape=(384, 1536))
    assert report.band == band("jordan", 0.001)
    assert report.slope == pytest.approx(3.4445**5)
    text = str(report)
    assert "jordan: 5 steps" in text
    assert "[0.4705, 1.2024] on singular values [0.001, 1]" in text
    assert "never changes" in text
    assert f"{5 * (4 * 384**2 * 1536 + 2 * 384**3) / 1e6:.1f} MFLOP" in text
    assert "CHANGES" in str(describe_schedule([(1.0, -2.0, 0.0)]))


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.5])
def test_a_floor_outside_the_unit_interval_is_refused(floor):
    with pytest.raises(MuonlabError, match=r"\(0, 1\]"):
        describe_schedule("jordan", floor=floor)
