"""What a schedule does to one singular value: its band, its sign on (0, 1], its cost.

Newton-Schulz maps G = U S Vᵀ to U f(S) Vᵀ, where f is the composition of the odd quintics of the schedule.
The continuous image of an interval is an interval, so the range of f over [floor, 1] follows step by step
from the ends of each interval and the critical points of each quintic; no grid is involved. Every step is
widened by what rounding can do to it, so the result is a bound, in exact arithmetic and in 64-bit numbers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.schedules import Coefficients, Row, Schedule, resolve_schedule

# One step in 64-bit numbers errs by less than ROUNDING times S(x) = |a| x + |b| x³ + |c| x⁵. In units of
# u = 2^-53: `scalar_map` rounds by at most 8 S, the evaluation in `image` by 7 S and its subtraction by 2 S. A
# computed critical point misses the true one by a relative sqrt(2 u) at worst, where p is flat to second order,
# so its value by no more than u^1.5 S. That makes 17; the rest of these 32 is reserve.
ROUNDING = 32 * 2.0**-53


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
    """Bounds of p(x) = a x + b x³ + c x⁵ over [low, high], 0 <= low <= high.

    No value lies outside, neither an exact one nor one computed in 64-bit numbers above 1e-300; the bounds are
    at most 2 ROUNDING (|a| x + |b| x³ + |c| x⁵) away from a value that is reached, at its x. (-inf, inf) where
    p overflows.
    """
    a, b, c = row
    points = [low, high]
    # p'(x) = a + 3 b x² + 5 c x⁴ = 0, a quadratic in t = x².
    for t in _real_roots(5 * c, 3 * b, a):
        if low * low < t < high * high:
            points.append(math.sqrt(t))
    lower, upper = [], []
    for x in points:
        t = x * x
        value = x * (a + t * (b + t * c))
        slack = ROUNDING * x * (abs(a) + t * (abs(b) + t * abs(c)))
        if not max(slack, t * t) < math.inf:
            return -math.inf, math.inf
        lower.append(value - slack)
        upper.append(value + slack)
    return min(lower), max(upper)


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
    """[low, high] that holds f(x) for every singular value x in [floor, 1], 0 < floor <= 1.

    It holds the exact f(x) and what `scalar_map` computes of it in float64. It is as narrow as rounding lets
    it be: a step passes the rounding of the steps before it on, times its slope, which comes to some 1e-4 at
    worst for nine undamped steps fitted on [1e-6, 1], and to less than 1e-8 for the published tables.
    An interval that dips below zero half-way is followed with its sign. (1, 1) for `svd`; (-inf, inf) where a
    step overflows and `scalar_map` may give NaN.
    """
    chosen = resolve_schedule(schedule, steps)
    _check_floor(floor)
    if chosen.exact:
        return 1.0, 1.0
    low, high = (1 - ROUNDING) * floor / chosen.margin, (1 + ROUNDING) / chosen.margin
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
    """Whether f(x) > 0 for every x in (0, 1]; True is a proof, and False also where rounding leaves it open.

    Every quintic must be positive on (0, high], where high is the largest value that the steps before it
    reach. (The interval (0, high] is covered whole, because f is continuous and 0 maps to 0: a zero of any
    step there is a zero of f.)
    """
    chosen = resolve_schedule(schedule, steps)
    high = (1 + ROUNDING) / chosen.margin
    for row in chosen.rows:
        if not _positive(row, high):
            return False
        high = image(row, 0.0, high)[1]
    return True


def _positive(row: Row, high: float) -> bool:
    """Whether p(x) / x = a + b t + c t² is above its rounding for every t = x² in [0, high²]."""
    a, b, c = row
    t = high * high
    ends = a > 0 and a + t * (b + t * c) > ROUNDING * (a + t * (abs(b) + t * abs(c)))
    if not (ends and b < 0 < c and -b < 2 * c * t):
        return ends
    # the lowest point, at t = -b / (2 c), lies within
    depth = b * b / (4 * c)
    return a - depth > ROUNDING * (a + depth)


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
    """Band over singular values [floor, 1], sign check, slope at zero, and FLOPs at `shape` (rows, cols).

    Everything is computed from the rows; nothing is quoted. Raises MuonlabError for an unknown name or a
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
