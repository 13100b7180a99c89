"""Statistics of a few seeds: intervals, tests of a claimed range, and their correction over many claims.

Everything takes one number per seed. `analysis.comparison` pairs the seeds of two arms first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from muonlab.errors import MuonlabError

CONFIDENCE = 0.95
SIGNIFICANT = 0.05  # a p below this is a finding
POWER = 0.8  # with which `smallest_detectable` would have been a finding


@dataclass(frozen=True)
class Interval:
    """An estimate, the ends of its 95 % confidence interval (NaN where there is none), and the number of values."""

    estimate: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return f"{self.estimate:.3f} (n={self.n})"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def exp(self) -> "Interval":
        """The interval of a geometric mean, from that of the mean logarithm."""
        return Interval(math.exp(self.estimate), math.exp(self.low), math.exp(self.high), self.n)


@dataclass(frozen=True)
class Region:
    """Where a claim says that a mean lies: above `low` and below `high`; infinite where there is no limit."""

    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether one value lies there; an infinite one does where there is no limit."""
        return (value > self.low or self.low == -math.inf) and (value < self.high or self.high == math.inf)


def t_interval(values: ArrayLike) -> Interval:
    """Student's 95 % interval of the mean: mean ± t_{n-1} s / sqrt(n), s with n - 1. For few seeds; assumes near-normal
    values, for which the coverage is exact from n = 2 on. One value has no interval. Raises MuonlabError for
    non-finite or no values."""
    x = np.asarray(values, float)
    if not len(x) or not np.isfinite(x).all():
        raise MuonlabError(f"an interval needs finite values, not {x.tolist()}")
    if len(x) < 2:
        return Interval(float(x.mean()), math.nan, math.nan, len(x))
    from scipy import stats

    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))


def share_interval(count: int, n: int) -> Interval:
    """The exact (Clopper-Pearson) 95 % interval of a share, observed in `count` of `n` independent runs: 0 of 5 is
    compatible with up to 0.52. Its coverage is at least 95 %. Raises MuonlabError for n = 0."""
    if n < 1:
        raise MuonlabError("a share of no runs has no interval")
    from scipy import stats

    ends = stats.binomtest(count, n).proportion_ci(CONFIDENCE, method="exact")
    return Interval(count / n, float(ends.low), float(ends.high), n)


def share_bound(count: int, n: int) -> float:
    """The exact one-sided 95 % upper bound of a share observed in `count` of `n` runs: 1 - 0.05^(1/n) for none."""
    from scipy import stats

    return 1.0 if count == n else float(stats.beta.ppf(CONFIDENCE, count + 1, n - count))


# ---------------------------------------------------------------- tests
def paired_p(differences: np.ndarray) -> float:
    """p of the two-sided paired t test against no difference: NaN for one pair; 1 or 0 where all differences are
    equal."""
    return two_sided(one_sided(differences, Region(low=0.0)).inside)


@dataclass(frozen=True)
class Tails:
    """The one-sided p of both statements on a mean: it lies inside a region; it lies outside. NaN for one value."""

    inside: float
    outside: float


def one_sided(values: ArrayLike, region: Region) -> Tails:
    """Student's t tests of the mean of `values` against the limits of `region`.

    inside: the largest p of the tests against each limit, which for a region around 0 is the two one-sided tests of
    equivalence (Schuirmann 1987). outside: the smallest p beyond a limit, times the number of limits. Values that are
    all equal lie on one side for sure.
    """
    limits = [(region.low, "greater", "less"), (region.high, "less", "greater")]
    limits = [limit for limit in limits if math.isfinite(limit[0])]
    if len(np.atleast_1d(values)) < 2:
        return Tails(math.nan, math.nan)
    inside = [_t_test(values, limit, within) for limit, within, _ in limits]
    outside = [_t_test(values, limit, beyond) for limit, _, beyond in limits]
    return Tails(max(inside, default=0.0), min(1.0, len(limits) * min(outside, default=1.0)))


def two_sided(p: float) -> float:
    """The two-sided p of a test whose one-sided p is `p` on either side."""
    return 2 * min(p, 1 - p)


def smallest_detectable(values: ArrayLike) -> float:
    """The smallest mean that a two-sided t test on as many such values would find with a power of 0.8: the delta for
    which the noncentral t of n - 1 degrees and delta sqrt(n) / s passes the quantile; NaN for one value."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return math.nan
    from scipy import optimize, stats

    freedom = len(x) - 1
    quantile = stats.t.ppf(1 - SIGNIFICANT / 2, freedom)

    def lack(shift: float) -> float:
        return float(stats.nct.sf(quantile, freedom, shift)) - POWER

    shift = optimize.brentq(lack, 0.0, 10 * quantile)
    return float(shift * x.std(ddof=1) / math.sqrt(len(x)))


def _t_test(values: ArrayLike, limit: float, side: str) -> float:
    x = np.asarray(values, float)
    if np.ptp(x) == 0:
        beyond = x[0] > limit if side == "greater" else x[0] < limit
        return 0.0 if beyond else 0.5 if x[0] == limit else 1.0
    from scipy import stats

    return float(stats.ttest_1samp(x, limit, alternative=side).pvalue)


# ---------------------------------------------------------------- several claims
def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for several comparisons (Scand. J. Statist. 6, 1979): the k-th smallest
    of m values is multiplied by m - k + 1, kept at least as large as the one before and at most 1. NaN
    stays NaN and is not counted among the m."""
    return _adjusted(p_values, lambda k, m: m - k + 1, np.maximum.accumulate)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """The false discovery rate at which each p is still a finding (J. R. Statist. Soc. B 57, 1995): the k-th smallest
    of m values is multiplied by m / k and kept at most as large as the one after. NaN stays NaN and is not counted
    among the m."""
    return _adjusted(p_values, lambda k, m: m / k, lambda q: np.minimum.accumulate(q[::-1])[::-1])


def _adjusted(
    p_values: Sequence[float],
    factor: Callable[[np.ndarray, int], np.ndarray],
    monotone: Callable[[np.ndarray], np.ndarray],
) -> list[float]:
    p = np.asarray(p_values, float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN comes last
    adjusted = np.full(len(p), math.nan)
    adjusted[order] = np.minimum(1.0, monotone(factor(np.arange(1, len(order) + 1), len(order)) * p[order]))
    return adjusted.tolist()


def alpha_spent(look: int, looks: Sequence[int]) -> float:
    """The part of the 0.05 that the look at `look` seeds may spend, of those planned in `looks`.

    Lan and DeMets' spending function of Pocock's type, 0.05 ln(1 + (e - 1) t) up to the share t of the last look's
    seeds (Biometrika 70, 1983); a look spends what it adds to the one before, so that the looks together err in at
    most 0.05, however they depend on each other. Raises MuonlabError for a look that was not planned.
    """
    if look not in looks:
        raise MuonlabError(f"a look at {look} seeds was not planned; planned: {', '.join(map(str, looks))}")
    before = max((each for each in looks if each < look), default=0)
    spent = [SIGNIFICANT * math.log1p((math.e - 1) * seeds / max(looks)) for seeds in (before, look)]
    return spent[1] - spent[0]
