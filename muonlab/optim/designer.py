"""A Newton-Schulz schedule for any number of steps and any spectral floor, by minimax fitting.

Polar Express (Amsel, Persson, Musco, Gower, arXiv 2505.16932, Theorem 3.1): the composition of odd quintics
that brings all singular values in [floor, 1] closest to 1 is built greedily. Each step takes the quintic
closest to 1 on the interval that the steps before it left.
"""

import math

import numpy as np

from muonlab.errors import MuonlabError
from muonlab.optim.bands import band, keeps_sign
from muonlab.optim.schedules import Row, Schedule

# The published setting of Polar Express: bounds a step's smallest output at about 2 % of its largest.
CUSHION = 0.02407327424182761

# A quintic that is minimax down to this fraction of its interval loses about half of its 16 digits there.
RESOLVED = 1e-6


def design_schedule(
    steps: int, floor: float = 1e-3, safety: float = 1.01, cushion: float = CUSHION
) -> Schedule:
    """The schedule of `steps` rows whose worst error over singular values [floor, 1] is smallest.

    `floor` is the smallest singular value, relative to the Frobenius norm, that is to come out near 1;
    smaller ones come out positive and below the band. `safety` >= 1 damps every row but the last, p(x /
    safety): values may be pushed above 1 by rounding up to that factor; 1 in exact arithmetic. `cushion` in
    [0, 1) fits a step on [cushion * u, u] in place of [l, u] where l is smaller, so that no singular value
    comes near 0 half-way and is lost in bf16; 0 gives the exact optimum.

    The schedule never changes sign on (0, 1], and maps [floor, 1] into `band(schedule, floor)`, above 0. Both
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
    if not keeps_sign(schedule) or band(schedule, floor)[0] <= 0:
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
