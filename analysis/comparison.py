"""The one comparison: an arm minus its baseline seed by seed, its interval, p, margin and noise floor.

The sweep's table, the claims and the figures all compare arms by these functions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.columns import LOST
from analysis.inference import (
    SIGNIFICANT,
    Interval,
    Region,
    one_sided,
    paired_p,
    smallest_detectable,
    t_interval,
)
from muonlab.errors import MuonlabError

# Two mean losses (nats) closer than this are the same for every purpose: the differences of interest are as small
# (Wen et al., arXiv 2509.02046).
LOSS_MARGIN = 3e-3


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
    pair. floor: the noise floor, the standard deviation over seeds pooled over both arms; NaN where neither has two
    seeds. It is shown, and judges nothing.
    """

    seeds: tuple[int, ...]
    differences: np.ndarray
    difference: Interval
    p: float
    floor: float

    @property
    def detectable(self) -> float:
        """The smallest difference that so many seeds of this spread would have shown; see `smallest_detectable`."""
        return smallest_detectable(self.differences)

    def word(self, p: float) -> str:
        """ "lower", "higher", "equal", "unresolved" or, for one pair, "untested": of losses in nats.

        Equal are those that differ by less than LOSS_MARGIN, by the two one-sided tests. p: this comparison's own, or
        corrected (`holm`) where several are judged together.
        """
        if self.difference.n < 2:
            return "untested"
        if one_sided(self.differences, Region(-LOSS_MARGIN, LOSS_MARGIN)).inside < SIGNIFICANT:
            return "equal"
        if not p < SIGNIFICANT:
            return "unresolved"
        return "lower" if self.difference.estimate < 0 else "higher"


def compare(arm: Sample, baseline: Sample, unit: str = "nats", what: str = "value") -> Paired:
    """Compare two samples seed by seed.

    unit: of the values; "x" compares natural logarithms. what: names the values in errors. Infinite values count as
    the largest finite one of either side, so that no difference is overstated. Raises MuonlabError where no seed has
    a value on both sides, where every value is infinite, and for a ratio of values that are not positive.
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
