"""A Newton-Schulz schedule, what it does to a singular value, and how one is fitted.

One step maps every singular value x of the normalised matrix to p(x) = a x + b x³ + c x⁵, in matrix form
X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X, so G = U S Vᵀ goes to U f(S) Vᵀ, f being the composition of the steps. The image of
an interval under a continuous f is an interval, so the range of f over [floor, 1] follows step by step from the ends of
each interval and the critical points of each quintic; no grid is involved. Every step is widened by what rounding can
do to it, so the result is a bound, in exact arithmetic and in 64-bit numbers.

`design_schedule` fits a schedule for any number of steps and any spectral floor. Polar Express (Amsel, Persson, Musco,
Gower, arXiv 2505.16932, Theorem 3.1): the composition of odd quintics that brings all singular values in [floor, 1]
closest to 1 is built greedily. Each step takes the quintic closest to 1 on the interval that the steps before it left.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from muonlab.errors import MuonlabError

Row = tuple[float, float, float]

# One step in 64-bit numbers errs by less than ROUNDING times S(x) = |a| x + |b| x³ + |c| x⁵. In units of
# u = 2^-53: `scalar_map` rounds by at most 8 S, the evaluation in `image` by 7 S and its subtraction by 2 S. A
# computed critical point misses the true one by a relative sqrt(2 u) at worst, where p is flat to second order,
# so its value by no more than u^1.5 S. That makes 17; the rest of these 32 is reserve.
ROUNDING = 32 * 2.0**-53

# The published setting of Polar Express: bounds a step's smallest output at about 2 % of its largest.
CUSHION = 0.02407327424182761

# A quintic that is minimax down to this fraction of its interval loses about half of its 16 digits there.
RESOLVED = 1e-6


@dataclass(frozen=True)
class Schedule:
    """Rows (a, b, c) and how the matrix is normalised before the first of them.

    `rows` is empty for the exact arm (`svd`), which iterates nothing. The matrix is divided by `margin`
    times its Frobenius norm, so singular values start in (0, 1/margin]. `row_rescaling` puts the AOL
    rescaling of the short side (`muonlab.optim.newton_schulz.aol_rescale_`) in place of the Frobenius norm.
    `usual_steps` is the number of rows that practice runs where the published table is longer; 0 means all.
    """

    name: str
    rows: tuple[Row, ...]
    source: str
    margin: float = 1.0
    row_rescaling: bool = False
    usual_steps: int = 0

    @property
    def exact(self) -> bool:
        """True for the arm that takes the polar factor from a singular value decomposition."""
        return not self.rows

    @property
    def steps(self) -> int:
        """Number of iterations; 0 for the exact arm."""
        return len(self.rows)

    def scalar_map(self, x: Tensor) -> Tensor:
        """f(x) elementwise for singular values x of the matrix before the margin; 1 (0 at 0) for `svd`.

        For a schedule with row rescaling x is a singular value of the rescaled matrix.
        """
        if self.exact:
            return torch.sign(x)
        y = x / self.margin
        for a, b, c in self.rows:
            y = y * (a + b * y**2 + c * y**4)
        return y

    def band(self, floor: float) -> tuple[float, float]:
        """[low, high] that holds f(x) for every singular value x in [floor, 1], 0 < floor <= 1.

        It holds the exact f(x) and what `scalar_map` computes of it in float64. It is as narrow as rounding lets it be:
        a step passes the rounding of the steps before it on, times its slope, which comes to some 1e-4 at worst for
        nine undamped steps fitted on [1e-6, 1], and to less than 1e-8 for the published tables. An interval that dips
        below zero half-way is followed with its sign. (1, 1) for `svd`; (-inf, inf) where a step overflows and
        `scalar_map` may give NaN. Raises MuonlabError for a floor outside (0, 1].
        """
        if not 0 < floor <= 1:
            raise MuonlabError(f"the spectral floor must lie in (0, 1], not {floor!r}")
        if self.exact:
            return 1.0, 1.0
        low, high = (1 - ROUNDING) * floor / self.margin, (1 + ROUNDING) / self.margin
        for row in self.rows:
            low, high = _signed_image(row, low, high)
        return low, high

    def keeps_sign(self) -> bool:
        """Whether f(x) > 0 for every x in (0, 1]; True is a proof, and False also where rounding leaves it open.

        Every quintic must be positive on (0, high], where high is the largest value that the steps before it reach.
        (The interval (0, high] is covered whole, because f is continuous and 0 maps to 0: a zero of any step there is a
        zero of f.)
        """
        high = (1 + ROUNDING) / self.margin
        for row in self.rows:
            if not _positive(row, high):
                return False
            high = image(row, 0.0, high)[1]
        return True

    def flops(self, rows: int, cols: int) -> int:
        """Multiply-adds times two of the plain iteration on one (rows, cols) matrix: steps * (4 n² m + 2 n³).

        n is the shorter side, m the longer. A step with c = 0 saves the square of the Gram matrix, 2 n³. `svd` counts
        0: a singular value decomposition takes no fixed number of operations.
        """
        n, m = sorted((rows, cols))
        return sum(4 * n * n * m + (2 * n**3 if c else 0) for _, _, c in self.rows)


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


def _signed_image(row: Row, low: float, high: float) -> tuple[float, float]:
    """`image` for intervals of either sign: p is odd."""
    if low >= 0:
        return image(row, low, high)
    if high <= 0:
        down, up = image(row, -high, -low)
        return -up, -down
    left, right = _signed_image(row, low, 0.0), image(row, 0.0, high)
    return min(left[0], right[0]), max(left[1], right[1])


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


def design_schedule(
    steps: int, floor: float = 1e-3, safety: float = 1.01, cushion: float = CUSHION
) -> Schedule:
    """The schedule of `steps` rows whose worst error over singular values [floor, 1] is smallest.

    `floor` is the smallest singular value, relative to the Frobenius norm, that is to come out near 1;
    smaller ones come out positive and below the band. `safety` >= 1 damps every row but the last, p(x /
    safety): values may be pushed above 1 by rounding up to that factor; 1 in exact arithmetic. `cushion` in
    [0, 1) fits a step on [cushion * u, u] in place of [l, u] where l is smaller, so that no singular value
    comes near 0 half-way and is lost in bf16; 0 gives the exact optimum.

    The schedule never changes sign on (0, 1], and maps [floor, 1] into `schedule.band(floor)`, above 0. Both
    are checked here. Raises MuonlabError for settings out of range, and for floor and cushion both below
    1e-6, which 64-bit numbers do not resolve.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise MuonlabError(f"a schedule needs an integer number of steps of at least 1, not {steps!r}")
    if not 0 < floor < 1:
        raise MuonlabError(f"the spectral floor must lie in (0, 1), not {floor!r}")
    if not 1 <= safety < 2:
        raise MuonlabError(f"safety must lie in [1, 2), not {safety!r}")
    if not 0 <= cushion < 1:
        raise MuonlabError(f"cushion must lie in [0, 1), not {cushion!r}")
    if max(floor, cushion) < RESOLVED:
        raise MuonlabError(
            f"64-bit coefficients resolve a spectral floor of {floor:g} only with a cushion of at least "
            f"{RESOLVED:g}, not {cushion:g}"
        )
    low, high = float(floor), 1.0
    rows: list[Row] = []
    for step in range(steps):
        a, b, c = _cushioned_quintic(low, high, cushion)
        if step + 1 < steps:
            a, b, c = a / safety, b / safety**3, c / safety**5
        rows.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    schedule = Schedule(
        "minimax",
        tuple(rows),
        f"minimax fit of {steps} steps on [{floor:g}, 1], safety {safety:g}, after arXiv 2505.16932",
    )
    if not schedule.keeps_sign() or schedule.band(floor)[0] <= 0:
        raise MuonlabError(f"the fit of {steps} steps on [{floor:g}, 1] lost its sign to rounding")
    return schedule


def _cushioned_quintic(low: float, high: float, cushion: float) -> Row:
    """The minimax quintic on [max(low, cushion * high), high], scaled to be centred on 1 over [low, high]."""
    fitted = max(low, cushion * high)
    a, b, c = minimax_quintic(fitted, high)
    if fitted > low:
        at_low, at_high = (a * x + b * x**3 + c * x**5 for x in (low, high))
        scale = 2 / (at_low + at_high)
        a, b, c = a * scale, b * scale, c * scale
    return a, b, c


def minimax_quintic(low: float, high: float) -> Row:
    """The odd quintic p that minimises max |1 - p(x)| over [low, high], 0 < low <= high, by Remez exchange.

    The optimum equioscillates: p = 1 - E, 1 + E, 1 - E, 1 + E at low < q < r < high, where q and r are the
    critical points of p. Between 0 and q it rises, so it is positive on (0, high].
    """
    if low > (1 - 1e-4) * high:
        # Here the exchange is degenerate. The quintic that is 1 to third order at the middle is within 4e-13.
        middle = (low + high) / 2
        return 15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5
    # in units of `high`, for the conditioning of the powers
    low_ratio = low / high
    q, r = 0.75 * low_ratio + 0.25, 0.25 * low_ratio + 0.75
    previous = math.inf
    for _ in range(100):  # converges quadratically: in fewer than 10 rounds from these points
        points = np.array([low_ratio, q, r, 1.0])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([points, points**3, points**5, signs], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        if abs(error - previous) <= 1e-15:
            break
        previous = error
        # p'(x) = a + 3 b x² + 5 c x⁴ = 0
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return float(a / high), float(b / high**3), float(c / high**5)
