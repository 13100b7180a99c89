"""Loss and gradient spikes by published definitions, detected in the stored traces and never in smoothed ones.

A definition measures every value of a series against the values before it. NaN is never a
spike and is excluded from what later values are measured against: a NaN loss is divergence, which is a run's
status. An infinity is a spike of infinite height, and is excluded likewise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from muonlab.errors import MuonlabError
from muonlab.registry import Registry

Series = pd.Series | np.ndarray | Sequence[float]
DEFINITIONS: Registry["Measure"] = Registry("spike definition")
SCORED = {
    "olmo2": ("train_loss", "grad_norm"),
    "six_sigma": ("train_loss", "grad_norm"),
    "rolling_2x": ("train_loss",),
    "zclip": ("grad_norm",),
}
"""The columns of a run's trace that each definition is applied to: those that its authors apply it to."""
EVENT_COLUMNS = {
    "step": "int64",
    "value": "float64",
    "definition": "str",
    "height": "float64",
    "peak": "float64",
    "duration": "float64",
}

RECOVERED_SIGMAS = 2.0
"""A spike is over at the first value no higher than the mean before it plus this many standard deviations. No
published definition says when a spike ends: this one is ours."""


class Measure(NamedTuple):
    """For every value of a series: its height (in standard deviations or as a ratio; NaN where it was not
    scored), whether it is a spike, whether it is one downwards, and the level at which a spike that begins
    here is over."""

    height: np.ndarray
    spiked: np.ndarray
    dropped: np.ndarray
    normal: np.ndarray


@DEFINITIONS.register("olmo2")
def olmo2(x: np.ndarray, window: int | None = None, sigmas: float = 7.0) -> Measure:
    """At least `sigmas` standard deviations away, up or down, from the mean of the `window` values before:
    the spike score of OLMo 2 (arXiv:2501.00656) with seven and 1,000.

    `window` None is 1,000, or a tenth of a shorter series but no less than 50; the first `window` values are
    not scored. The paper leaves open whether x_t belongs to its own window; here it does not, so that a lone
    spike does not hide itself. Standard deviations are the population's.
    """
    if window is None:
        window = min(1000, max(50, len(x) // 10))
    mean, deviation = trailing_moments(x, window, ddof=0)
    height = (x - mean) / deviation
    height[:window] = np.nan
    return Measure(height, height >= sigmas, height <= -sigmas, mean + RECOVERED_SIGMAS * deviation)


@DEFINITIONS.register("six_sigma")
def six_sigma(x: np.ndarray, window: int = 128, sigmas: float = 6.0) -> Measure:
    """More than `sigmas` unbiased standard deviations above the mean of the up to `window` values before,
    once about half of them are there: when OLMo-core's SkipStepOptimizer skips a step."""
    mean, deviation = trailing_moments(x, window, ddof=1)
    height = (x - mean) / deviation
    height[: max(2, window // 2) - 1] = np.nan
    return _upward(height, height > sigmas, mean + RECOVERED_SIGMAS * deviation)


@DEFINITIONS.register("rolling_2x")
def rolling_2x(x: np.ndarray, window: int = 100, ratio: float = 2.0) -> Measure:
    """More than `ratio` times the mean of the `window` values before: what KillLossSpike of MosaicML's LLM
    Foundry calls an outlier (it stops a run after several in a row). The height is the ratio; the series must
    be positive."""
    mean, deviation = trailing_moments(x, window, ddof=0)
    height = x / mean
    height[:window] = np.nan
    return _upward(height, height > ratio, mean + RECOVERED_SIGMAS * deviation)


@DEFINITIONS.register("zclip")
def zclip(x: np.ndarray, decay: float = 0.97, sigmas: float = 2.5, warmup: int = 25) -> Measure:
    """More than `sigmas` standard deviations above a running mean: the gradient norms g that ZClip clips
    (arXiv:2504.02507, without its fixed cap). The first `warmup` values give the first mean and variance and
    are not scored.

        z = (g - mu) / (sigma + 1e-6)           g' = mu + sigmas^2 sigma / z  if z > sigmas, else g
        mu <- decay mu + (1 - decay) g'         sigma^2 <- decay sigma^2 + (1 - decay) (g' - mu)^2
    """
    height, normal = np.full(len(x), np.nan), np.full(len(x), np.nan)
    first = np.flatnonzero(np.isfinite(x))[:warmup]
    if len(first) == warmup:
        mean, variance = float(x[first].mean()), float(x[first].var())
        for t in range(first[-1] + 1, len(x)):
            value, sigma = float(x[t]), variance**0.5
            height[t] = z = (value - mean) / (sigma + 1e-6)
            normal[t] = mean + RECOVERED_SIGMAS * sigma
            if not np.isfinite(value):
                continue
            clipped = mean + sigmas**2 * sigma / z if z > sigmas else value
            mean = decay * mean + (1 - decay) * clipped
            variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
    return _upward(height, height > sigmas, normal)


def detect_spikes(series: Series, definition: str = "olmo2", **settings: object) -> pd.DataFrame:
    """The upward spikes of a series, one row each.

    `series` is a pandas Series indexed by step, or an array whose places are the steps; `settings` are those
    of the definition (its function here). Columns: `step` where it begins, `value` there, `definition`,
    `height` there (standard deviations or ratio), `peak` (the highest value until it is over) and `duration`,
    the steps until it is over (see RECOVERED_SIGMAS), NaN if it never is. What is flagged in between belongs
    to the same spike. Raises MuonlabError for an unknown definition or setting.
    """
    return events_of(series, measure(series, definition, **settings), definition)


def spike_score(
    series: Series, definition: str = "olmo2", upward_only: bool = False, **settings: object
) -> float:
    """The percentage of scored values that are flagged, each by itself.

    With the definition `olmo2` this is OLMo 2's spike score, which counts both directions; `upward_only`
    leaves out the drops, which the other definitions do not have. 0: no value is flagged. NaN: too short to score.
    """
    return score_of(measure(series, definition, **settings), upward_only)


def measure(series: Series, definition: str, **settings: object) -> Measure:
    """Every value of a series against a definition; raises MuonlabError for an unknown name or setting."""
    x = np.asarray(series, dtype=np.float64)
    if x.ndim != 1:
        raise MuonlabError(f"a series of values must be one-dimensional, not of shape {x.shape}")
    # A flat window divides by zero: a value that stays (0/0) is not scored, one that rises is infinitely far.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return DEFINITIONS.build(definition, settings, x)


def events_of(series: Series, measured: Measure, definition: str) -> pd.DataFrame:
    """The rows of `detect_spikes` for a series that has been measured."""
    x = np.asarray(series, dtype=np.float64)
    steps = series.index.to_numpy() if isinstance(series, pd.Series) else np.arange(len(x))
    events, over = [], 0
    for start in np.flatnonzero(measured.spiked):
        if start < over:
            continue
        over = _first_at_or_below(x, int(start) + 1, measured.normal[start])
        duration = steps[over] - steps[start] if over < len(x) else np.nan
        peak = np.nanmax(x[start:over])
        events.append((steps[start], x[start], definition, measured.height[start], peak, duration))
    return pd.DataFrame(events, columns=list(EVENT_COLUMNS)).astype(EVENT_COLUMNS)


def score_of(measured: Measure, upward_only: bool = False) -> float:
    """The percentage of `spike_score` for a series that has been measured."""
    scored = np.count_nonzero(~np.isnan(measured.height))
    flagged = measured.spiked if upward_only else measured.spiked | measured.dropped
    return 100.0 * int(np.count_nonzero(flagged)) / int(scored) if scored else math.nan


def trailing_moments(x: np.ndarray, window: int, ddof: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the finite ones among the `window` values before each; NaN below two.

    Every window is summed anew: running sums would carry the rounding of a spike of 1e30 into later ones.
    """
    if window < 2:
        raise MuonlabError(f"the window of a spike definition must be at least 2 steps, not {window}")
    finite = np.concatenate([np.zeros(window), np.isfinite(x)])
    value = np.concatenate([np.zeros(window), np.where(np.isfinite(x), x, 0.0)])
    finite, value = (np.lib.stride_tricks.sliding_window_view(a, window)[: len(x)] for a in (finite, value))
    mean, deviation = np.empty(len(x)), np.empty(len(x))
    rows = max(1, 2**17 // window)  # 1 MB at a time: it stays in the cache
    for part in (slice(begin, begin + rows) for begin in range(0, len(x), rows)):
        count = finite[part].sum(axis=1)
        count[count < 2] = np.nan
        mean[part] = value[part].sum(axis=1) / count
        off = (value[part] - mean[part, None]) * finite[part]
        deviation[part] = np.sqrt(np.einsum("ij,ij->i", off, off) / (count - ddof))
    return mean, deviation


def _first_at_or_below(x: np.ndarray, begin: int, level: float) -> int:
    """The first place from `begin` on where x <= level, or len(x); looks ahead in doubling strides."""
    width = 64
    while begin < len(x):
        places = np.flatnonzero(x[begin : begin + width] <= level)
        if len(places):
            return begin + int(places[0])
        begin, width = begin + width, 2 * width
    return len(x)


def _upward(height: np.ndarray, spiked: np.ndarray, normal: np.ndarray) -> Measure:
    return Measure(height, spiked, np.zeros_like(spiked), normal)
