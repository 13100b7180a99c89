"""The one comparison: an arm minus its baseline seed by seed, its interval, p and noise floor, and when it is a tie.

The sweep's table, the claims, the test of harm and the figures all compare arms by these functions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from analysis.columns import LOST
from muonlab.errors import MuonlabError

CONFIDENCE = 0.95
SIGNIFICANT = 0.05  # a p below this is a difference
# Differences in loss (nats) below this are ties whatever their interval (Wen et al., arXiv 2509.02046).
SMALLEST_DIFFERENCE = 3e-3


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
class Sample:
    """One number per seed. lost: the seeds whose run diverged or was too large for the memory; how far apart such runs
    end says nothing about luck, so they take no part in a noise floor."""

    by_seed: Mapping[int, float]
    lost: frozenset[int] = frozenset()

    @classmethod
    def of(cls, values: pd.Series, lost: frozenset[int] = frozenset()) -> "Sample":
        """The values of a series whose index is the seeds."""
        return cls(dict(zip(values.index.tolist(), values.tolist(), strict=True)), lost)


@dataclass(frozen=True)
class Paired:
    """An arm minus its baseline over the seeds that both have.

    seeds, differences: one entry per seed, in the unit of the values; for a ratio, differences of natural logarithms.
    difference: their mean with Student's 95 % interval. p: of the paired t test against no difference; NaN for one
    pair. floor: the noise floor, on the scale of the differences; NaN where neither side has two seeds.
    """

    seeds: tuple[int, ...]
    differences: np.ndarray
    difference: Interval
    p: float
    floor: float

    def direction(self, p: float) -> str:
        """ "lower", "higher", "tie" or, for one pair, "untested".

        A mean difference inside the noise floor is a tie however sure, and so is one with a p of 0.05 or more. p: this
        comparison's own, or corrected (`holm`) where several are judged together.
        """
        if self.difference.n < 2:
            return "untested"
        if not (abs(self.difference.estimate) > self.floor and p < SIGNIFICANT):
            return "tie"
        return "lower" if self.difference.estimate < 0 else "higher"

    def within(self, margin: float) -> bool:
        """Whether the mean difference is at most `margin` in either direction."""
        return abs(self.difference.estimate) <= margin


def compare(arm: Sample, baseline: Sample, unit: str = "nats", what: str = "value") -> Paired:
    """Compare two samples seed by seed.

    unit: of the values; "x" compares natural logarithms, and differences in "nats" below `SMALLEST_DIFFERENCE` are
    always within the floor. what: names the values in errors. Infinite values count as the largest finite one of
    either side, so that no difference is overstated. Raises MuonlabError where no seed has a value on both sides,
    where every value is infinite, and for a ratio of values that are not positive.
    """
    seeds = tuple(sorted(set(arm.by_seed) & set(baseline.by_seed)))
    if not seeds:
        raise MuonlabError(f"no seed has a value of {what} in both arms")
    values = np.array([[side.by_seed[seed] for seed in seeds] for side in (arm, baseline)])
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise MuonlabError(f"every {what} is infinite, so there is no difference to take")
    values = np.clip(values, finite.min(), finite.max())
    if unit == "x":
        if (values <= 0).any():
            raise MuonlabError(f"{what} is not positive everywhere, so it has no ratio")
        values = np.log(values)
    settled = [[seed not in side.lost for seed in seeds] for side in (arm, baseline)]
    floor = pooled_deviation([row[mask] for row, mask in zip(values, settled, strict=True)])
    if unit == "nats":
        floor = float(np.nanmax([floor, SMALLEST_DIFFERENCE]))
    differences = values[0] - values[1]
    return Paired(seeds, differences, t_interval(differences), paired_p(differences), floor)


def compare_arms(runs: pd.DataFrame, arm: str, baseline: str, metric: str = "loss") -> Paired:
    """Compare a metric of two arms over shared seeds.

    runs: `Frames.runs` with one run per arm and seed: choose the level first. metric: a column in nats; `loss` counts
    a diverged run with the loss at initialisation, so that it stays in. Raises MuonlabError where an arm has no run, a
    seed occurs twice, or the arms share none.
    """
    ours, theirs = (_sample(runs, name, metric) for name in (arm, baseline))
    if not set(ours.by_seed) & set(theirs.by_seed):
        raise MuonlabError(f"'{arm}' and '{baseline}' have no seed in common with a '{metric}'")
    return compare(ours, theirs, what=metric)


def harm_margin(losses: ArrayLike) -> float:
    """How far a clip may move the mean loss (nats) and be harmless: the half-width of the 95 % interval of the losses
    without it, at least `SMALLEST_DIFFERENCE`."""
    interval = t_interval(losses)
    return max(SMALLEST_DIFFERENCE, interval.high - interval.estimate)


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


def paired_p(differences: np.ndarray) -> float:
    """p of the paired t test against no difference: NaN for one pair, 1 or 0 where all differences are equal."""
    if len(differences) < 2:
        return math.nan
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for several comparisons (Scand. J. Statist. 6, 1979): the k-th smallest
    of m values is multiplied by m - k + 1, kept at least as large as the one before and at most 1. NaN
    stays NaN and is not counted among the m."""
    p = np.asarray(p_values, float)
    adjusted = np.full(len(p), math.nan)
    order = [i for i in np.argsort(p) if not math.isnan(p[i])]
    reached = 0.0
    for k, i in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - k) * p[i]))
        adjusted[i] = reached
    return adjusted.tolist()


def pooled_deviation(groups: Sequence[np.ndarray]) -> float:
    """The noise floor: standard deviation over seeds, pooled over groups by their degrees of freedom.

    Groups of one value say nothing; NaN where no group has two.
    """
    freedom = sum(max(0, len(x) - 1) for x in groups)
    squares = sum(x.var(ddof=1) * (len(x) - 1) for x in groups if len(x) > 1)
    return math.sqrt(squares / freedom) if freedom else math.nan


def _sample(runs: pd.DataFrame, arm: str, metric: str) -> Sample:
    rows = runs[runs["arm"] == arm].set_index("seed")
    if rows.empty:
        raise MuonlabError(f"there is no run of '{arm}'; arms: {', '.join(runs['arm'].unique())}")
    if rows.index.has_duplicates:
        again = sorted(set(rows.index[rows.index.duplicated()]))
        raise MuonlabError(
            f"'{arm}' has several runs of seed {again[0]}: choose one setting before comparing"
        )
    lost = frozenset(rows.index[rows["status"].isin(LOST)].tolist())
    return Sample.of(rows[metric].dropna(), lost)
