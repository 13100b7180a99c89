"""Intervals, paired comparisons, the noise floor, and when a difference is a tie."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from muonlab.errors import MuonlabError

CONFIDENCE = 0.95
# Differences in loss below this are ties whatever their interval (Wen et al., arXiv 2509.02046).
SMALLEST_DIFFERENCE = 3e-3


@dataclass(frozen=True)
class Interval:
    """An estimate, the ends of its confidence interval (NaN where n < 2), and the number of values behind
    it."""

    estimate: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return f"{self.estimate:.3f} (n={self.n})"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def excludes_zero(self) -> bool:
        """Whether both ends lie on one side of zero; False where there is no interval."""
        return self.low > 0 or self.high < 0


def t_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Student's interval of the mean: mean ± t_{n-1} s / sqrt(n), s with n - 1. For few seeds; assumes
    near-normal values, and covers as said from n = 2 on where they are. Raises MuonlabError for non-finite
    or no values."""
    x = _checked(values)
    if len(x) < 2:
        return Interval(float(x.mean()), math.nan, math.nan, len(x))
    from scipy import stats

    half = stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))


def share_interval(held: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """The exact (Clopper-Pearson) interval of a share of which `held` of `n` independent runs tell: 0 of 5 leaves up to
    0.52 open. It covers at least as said. Raises MuonlabError for no runs."""
    if n < 1:
        raise MuonlabError("a share of no runs has no interval")
    from scipy import stats

    ends = stats.binomtest(held, n).proportion_ci(confidence, method="exact")
    return Interval(held / n, float(ends.low), float(ends.high), n)


def noise_floor(runs: pd.DataFrame, metric: str = "loss", by: Sequence[str] = ("arm", "lr")) -> float:
    """Standard deviation over seeds of one setting, pooled over settings by their degrees of freedom.

    runs: a row a run with `metric` and the columns `by`, which name a setting; groups with one run say
    nothing. Runs that diverged are left out, since how far apart they end is no measure of luck. NaN where
    no setting has two seeds.
    """
    settled = runs[runs["status"] == "finished"]
    groups = settled.groupby(list(by), dropna=False)[metric]
    squares, freedom = (groups.var(ddof=1) * (groups.count() - 1)).sum(), (groups.count() - 1).sum()
    return math.sqrt(squares / freedom) if freedom else math.nan


@dataclass(frozen=True)
class Comparison:
    """An arm against a baseline over the seeds that both have.

    difference: mean of (arm - baseline) with its t interval, in the metric's unit; p: of the paired t test,
    NaN where it cannot be had; floor: the half-width inside which a difference is a tie.
    """

    difference: Interval
    p: float
    floor: float

    @property
    def verdict(self) -> str:
        """ "lower", "higher", "tie" or, with one pair only, "untested"."""
        if self.difference.n < 2:
            return "untested"
        if is_tie(self.difference, self.floor):
            return "tie"
        return "lower" if self.difference.estimate < 0 else "higher"


def is_tie(difference: Interval, floor: float) -> bool:
    """Whether a difference says nothing: it lies inside ±floor, whatever its sign, or its interval holds
    zero."""
    return abs(difference.estimate) <= floor or not difference.excludes_zero()


def compare(
    runs: pd.DataFrame, arm: str, baseline: str, metric: str = "loss", floor: float | None = None
) -> Comparison:
    """Compare two arms seed by seed.

    runs: `Frames.runs`, one run per arm and seed: choose the learning rate first. metric: `loss` counts a run
    that diverged with the loss at initialisation, so that it stays in. floor: None measures it: the larger of
    `SMALLEST_DIFFERENCE` and the noise floor of both arms. Raises MuonlabError where an arm has no run, a
    seed occurs twice, or the arms share none.
    """
    ours, theirs = (_by_seed(runs, name)[metric] for name in (arm, baseline))
    differences = (ours - theirs).dropna().to_numpy()
    if not len(differences):
        raise MuonlabError(f"'{arm}' and '{baseline}' have no seed in common with a '{metric}'")
    if floor is None:
        floor = np.nanmax([SMALLEST_DIFFERENCE, noise_floor(runs[runs["arm"].isin([arm, baseline])], metric)])
    return Comparison(t_interval(differences), paired_p(differences), float(floor))


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


def paired_p(differences: np.ndarray) -> float:
    """p of the paired t test against no difference: NaN for one pair, 1 or 0 where all differences are equal."""
    if len(differences) < 2:
        return math.nan
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0).pvalue)


def pooled_deviation(groups: Sequence[np.ndarray]) -> float:
    """Standard deviation over seeds, pooled over groups by their degrees of freedom: the noise floor of a measure.

    Values that are not finite are left out. NaN where no group has two values.
    """
    finite = [x[np.isfinite(x)] for x in groups]
    freedom = sum(max(0, len(x) - 1) for x in finite)
    squares = sum(x.var(ddof=1) * (len(x) - 1) for x in finite if len(x) > 1)
    return math.sqrt(squares / freedom) if freedom else math.nan


def _by_seed(runs: pd.DataFrame, arm: str) -> pd.DataFrame:
    chosen = runs[runs["arm"] == arm].set_index("seed")
    if chosen.empty:
        raise MuonlabError(f"there is no run of '{arm}'; arms: {', '.join(runs['arm'].unique())}")
    if chosen.index.has_duplicates:
        again = sorted(set(chosen.index[chosen.index.duplicated()]))
        raise MuonlabError(
            f"'{arm}' has several runs of seed {again[0]}: choose one setting before comparing"
        )
    return chosen


def _checked(values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, float)
    if not len(x) or not np.isfinite(x).all():
        raise MuonlabError(f"an interval needs finite values, not {x.tolist()}")
    return x
