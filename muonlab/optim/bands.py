"""What a schedule does to one singular value: its exact band, its sign on (0, 1], its cost.

Newton-Schulz maps G = U S Vᵀ to U f(S) Vᵀ, where f is the composition of the odd quintics of the schedule.
The continuous image of an interval is an interval, so the exact range of f over [floor, 1] follows step by
step from the critical points of each quintic; no grid is involved.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.schedules import Coefficients, Row, Schedule, resolve_schedule


def scalar_map(schedule: Coefficients, x: Tensor, steps: int | None = None) -> Tensor:
    """f(x) elementwise for singular values x of the matrix before the schedule's margin; 1 (0 at 0) for
    `svd`.

    For a schedule with row rescaling x is a singular value of the rescaled matrix.
    """
    chosen = resolve_schedule(schedule, steps)
    if chosen.exact:
        return torch.sign(x)
    y = x / chosen.margin
    for a, b, c in chosen.rows:
        y = y * (a + b * y**2 + c * y**4)
    return y


def image(row: Row, low: float, high: float) -> tuple[float, float]:
    """Exact minimum and maximum of p(x) = a x + b x³ + c x⁵ over [low, high], 0 <= low <= high."""
    a, b, c = row
    points = [low, high]
    # p'(x) = a + 3 b x² + 5 c x⁴ = 0, a quadratic in t = x².
    for t in _real_roots(5 * c, 3 * b, a):
        if low * low < t < high * high:
            points.append(math.sqrt(t))
    values = [x * (a + x * x * (b + x * x * c)) for x in points]
    return min(values), max(values)


def _real_roots(a: float, b: float, c: float) -> list[float]:
    """Real roots of a t² + b t + c, without the cancellation of the school formula."""
    if a == 0:
        return [] if b == 0 else [-c / b]
    discriminant = b * b - 4 * a * c
    if discriminant < 0:
        return []
    q = -(b + math.copysign(math.sqrt(discriminant), b)) / 2
    return [q / a] + ([c / q] if q else [])


def band(schedule: Coefficients, floor: float, steps: int | None = None) -> tuple[float, float]:
    """Exact [min, max] of f over singular values [floor, 1] of the normalised matrix, 0 < floor <= 1.

    A wide image interval that dips below zero is followed with its sign, so the band is exact for every
    schedule.
    """
    chosen = resolve_schedule(schedule, steps)
    _check_floor(floor)
    if chosen.exact:
        return 1.0, 1.0
    low, high = floor / chosen.margin, 1.0 / chosen.margin
    for row in chosen.rows:
        low, high = _signed_image(row, low, high)
    return low, high


def _signed_image(row: Row, low: float, high: float) -> tuple[float, float]:
    """`image` for intervals of either sign: p is odd."""
    if low >= 0:
        return image(row, low, high)
    if high <= 0:
        down, up = image(row, -high, -low)
        return -up, -down
    left, right = _signed_image(row, low, 0.0), image(row, 0.0, high)
    return min(left[0], right[0]), max(left[1], right[1])


def keeps_sign(schedule: Coefficients, steps: int | None = None) -> bool:
    """Whether f(x) > 0 for every x in (0, 1], by exact reasoning.

    Every quintic must be positive on (0, high], where high is the largest value that the steps before it
    reach. (The interval (0, high] is covered whole, because f is continuous and 0 maps to 0: a zero of any
    step there is a zero of f.)
    """
    chosen = resolve_schedule(schedule, steps)
    high = 1.0 / chosen.margin
    for a, b, c in chosen.rows:
        # p(x)/x = a + b t + c t² > 0 for t = x² in [0, high²]
        if a <= 0 or any(0 < t <= high * high for t in _real_roots(c, b, a)):
            return False
        high = image((a, b, c), 0.0, high)[1]
    return True


def flops(schedule: Coefficients, rows: int, cols: int, steps: int | None = None) -> int:
    """Multiply-adds times two of the plain iteration on one (rows, cols) matrix: steps * (4 n² m + 2 n³).

    n is the shorter side, m the longer. A step with c = 0 saves the square of the Gram matrix, 2 n³. The
    exact arm counts 0: a singular value decomposition is no fixed number of operations.
    """
    n, m = sorted((rows, cols))
    return sum(4 * n * n * m + (2 * n**3 if c else 0) for _, _, c in resolve_schedule(schedule, steps).rows)


@dataclass(frozen=True)
class ScheduleReport:
    """Figures of one schedule; `str()` prints them as a paragraph."""

    schedule: Schedule
    floor: float
    band: tuple[float, float]
    keeps_sign: bool
    slope: float
    flops: int
    shape: tuple[int, int]

    def __str__(self) -> str:
        chosen = self.schedule
        (low, high), (rows, cols) = self.band, self.shape
        sign = "never changes" if self.keeps_sign else "CHANGES: some updates are reversed"
        lines = [
            f"{chosen.name}: {chosen.steps} steps",
            f"  source          {chosen.source}",
            f"  normalisation   {_normalisation(chosen)}",
            f"  band            [{low:.4f}, {high:.4f}] on singular values [{self.floor:g}, 1]",
            f"  sign on (0, 1]  {sign}",
            f"  slope at 0      {self.slope:.4g}",
            f"  cost            {self.flops / 1e6:.1f} MFLOP for {rows} x {cols}, plain form",
        ]
        return "\n".join(lines)


def describe_schedule(
    schedule: Coefficients,
    steps: int | None = None,
    floor: float = 0.01,
    shape: tuple[int, int] = (768, 768),
) -> ScheduleReport:
    """Band over singular values [floor, 1], sign check, slope at zero, and FLOPs at `shape`.

    Everything is recomputed from the rows; nothing is quoted. Raises MuonlabError for an unknown name or a
    floor outside (0, 1].
    """
    chosen = resolve_schedule(schedule, steps)
    slope = math.inf if chosen.exact else math.prod(a for a, _, _ in chosen.rows) / chosen.margin
    return ScheduleReport(
        chosen, floor, band(chosen, floor), keeps_sign(chosen), slope, flops(chosen, *shape), shape
    )


def _normalisation(schedule: Schedule) -> str:
    unit = "AOL row rescaling" if schedule.row_rescaling else "Frobenius norm"
    return unit if schedule.margin == 1 else f"{unit}, divided by {schedule.margin:g}"


def _check_floor(floor: float) -> None:
    if not 0 < floor <= 1:
        raise MuonlabError(f"the spectral floor must lie in (0, 1], not {floor!r}")
