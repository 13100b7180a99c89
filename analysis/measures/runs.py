"""Measures of one run, read from its traces: targets, ends, peaks, how a trace rises and falls."""

import math

import numpy as np
import pandas as pd

from analysis.columns import END_SHARE
from analysis.measures.registry import Part, measure
from muonlab.errors import MuonlabError
from muonlab.record.spikes import trailing_moments


def first_crossing(readings: pd.Series, target: float) -> float:
    """The step (index, interpolated in a straight line) at which readings are first at or below `target`.

    Infinity where they never are. Readings that are not finite are above every target.
    """
    values = readings.to_numpy(float)
    reached = np.flatnonzero(values <= target)
    if not len(reached):
        return math.inf
    i = reached[0]
    if i == 0 or not math.isfinite(values[i - 1]):
        return float(readings.index[i])
    share = (values[i - 1] - target) / (values[i - 1] - values[i])
    return float(readings.index[i - 1] + share * (readings.index[i] - readings.index[i - 1]))


def _to_target(part: Part, clock: str, target: float, column: str) -> float:
    step = first_crossing(part.trace(column), target)
    if clock == "step" or math.isinf(step):
        return step
    spent = part.trace(clock)
    return float(np.interp(step, spent.index, spent))


def _end_of(clock: str):
    """The last reading of a clock: what a run that never reached its target has spent."""

    def limit(part: Part, target: float, column: str = "probe_loss") -> float:
        return float(part.steps["step"].max() if clock == "step" else part.trace(clock).iloc[-1])

    return limit


@measure("run", "steps", "Jordan 2024; censored after Wen et al. (arXiv 2509.02046)", limit=_end_of("step"))
def steps_to_target(part: Part, target: float, column: str = "probe_loss") -> float:
    """Steps until `column` (nats) first reads `target` or less, interpolated; infinite where it never does."""
    return _to_target(part, "step", target, column)


@measure("run", "tokens", "Jordan 2024, Fig 1", limit=_end_of("tokens"))
def tokens_to_target(part: Part, target: float, column: str = "probe_loss") -> float:
    """Training tokens until `column` first reads `target` or less; infinite where it never does."""
    return _to_target(part, "tokens", target, column)


@measure("run", "FLOPs", "Jordan 2024", limit=_end_of("flops"))
def flops_to_target(part: Part, target: float, column: str = "probe_loss") -> float:
    """FLOPs of the model (without the optimizer) until `column` first reads `target`; infinite where it never does."""
    return _to_target(part, "flops", target, column)


@measure("run", "s", "Jordan 2024, Fig 2", limit=_end_of("seconds"))
def seconds_to_target(part: Part, target: float, column: str = "probe_loss") -> float:
    """Wall-clock seconds until `column` first reads `target`; infinite where it never does."""
    return _to_target(part, "seconds", target, column)


@measure("run", "", "muonlab: max logits at equal loss")
def logit_at_loss(part: Part, target: float, column: str = "probe_loss") -> float:
    """The max logit of the step at which `column` (nats) first reads `target` or less; NaN where it never does."""
    step = first_crossing(part.trace(column), target)
    if math.isinf(step):
        return math.nan
    logits = part.trace("max_logit")
    return float(np.interp(step, logits.index, logits))


def _before_divergence(part: Part, column: str = "probe_loss", **_: float) -> float:
    loss = column.endswith("loss")
    return float(part.only["initial_loss"].iloc[0] if loss else part.trace(column).iloc[-1])


@measure("run", "", "muonlab", limit=_before_divergence)
def value_at(
    part: Part,
    column: str = "probe_loss",
    share: float | None = None,
    step: float | None = None,
    over: str = "max",
) -> float:
    """A column at `step`, or at a `share` of the run's steps, interpolated between its readings.

    Infinite where the run diverged before; then a loss counts as at initialisation, anything else as last read. Raises
    MuonlabError unless one of the two is given.
    """
    if (share is None) == (step is None):
        raise MuonlabError("value_at needs either `share` or `step`")
    readings = part.trace(column, over)
    at = step if step is not None else share * readings.index.max()
    if at > part.steps["step"].max() and part.only["status"].iloc[0] == "diverged":
        return math.inf
    return float(np.interp(at, readings.index, readings))


@measure("run", "", "the test `exploded`")
def end(part: Part, column: str, over: str = "max") -> float:
    """Median of a column's readings in the last 5 % of the steps, or its last reading."""
    readings = part.trace(column, over)
    tail = readings[readings.index > (1 - END_SHARE) * part.steps["step"].max()]
    return float(tail.median() if len(tail) else readings.iloc[-1])


@measure("run", "", "muonlab")
def peak(part: Part, column: str, over: str = "max") -> float:
    """The largest reading of a column."""
    return float(part.trace(column, over).max())


@measure("run", "", "muonlab")
def average(part: Part, column: str, over: str = "max") -> float:
    """The mean of a column's readings over the run, for columns that are noisy."""
    return float(part.trace(column, over).mean())


@measure("run", "x", "Moonlight Fig 7c: rise and fall")
def peak_over_end(part: Part, column: str = "max_logit") -> float:
    """Largest reading over the median of the last 5 % of the steps: 1 at a trace's top, above where it fell."""
    return peak(part, column) / end(part, column)


@measure("run", "x", "the test `exploded`")
def growth(part: Part, column: str = "max_logit", over: str = "max") -> float:
    """The end (last 5 % of the steps) over the first reading after warm-up; NaN for a run that ended within it."""
    after = after_warmup(part, part.trace(column, over))
    return end(part, column, over) / float(after.iloc[0]) if len(after) else math.nan


def after_warmup(part: Part, readings: pd.Series) -> pd.Series:
    """The readings from the end of the warm-up on; all of them where there was none."""
    return readings[~(readings.index < part.only["warmup_steps"].iloc[0])]


@measure("run", "", "muonlab")
def change(part: Part, start: float, stop: float, column: str = "probe_loss", log: bool = False) -> float:
    """A column at step `stop` minus itself at `start`; with `log` the difference of natural logarithms."""
    first, last = (value_at(part, column, step=step) for step in (start, stop))
    return math.log(last / first) if log else last - first


@measure("run", "nats", "muonlab: what a spike score misses")
def excess_loss(part: Part, column: str = "train_loss", window: int = 25) -> float:
    """How far the trailing median of `window` readings lies above its own running minimum, averaged over the run.

    It detects slow divergence and sustained shifts, which a spike score misses.
    """
    smooth = part.trace(column).rolling(window, min_periods=window).median().dropna()
    return float((smooth - smooth.cummin()).mean())


@measure("run", "nats", "muonlab: the power of a search that finds no spike")
def smallest_spike(part: Part, column: str = "train_loss", window: int = 50, sigmas: float = 7.0) -> float:
    """The least height above the trailing mean at which a spike would have been found: the median over the run of
    `sigmas` standard deviations of the `window` readings before, as in OLMo 2's spike score."""
    _, deviation = trailing_moments(part.trace(column).to_numpy(float), window, ddof=0)
    return float(sigmas * np.nanmedian(deviation[window:]))


@measure(
    "run", "learning rate", "muonlab: the learning-rate ramp", limit=lambda part, **_: _largest_rate(part)
)
def rate_at_failure(part: Part, margin: float = 0.3, column: str = "probe_loss") -> float:
    """The scheduled learning rate at which a loss first lies `margin` nats above its running minimum.

    Infinite where it never does; a run that diverged failed at its last step at the latest.
    """
    readings, rates = part.trace(column), part.trace("scheduled_lr")
    failed = readings[readings > readings.cummin() + margin].index
    if len(failed):
        return float(np.interp(failed[0], rates.index, rates))
    return float(rates.iloc[-1]) if part.only["status"].iloc[0] == "diverged" else math.inf


@measure("run", "", "Kimi K2, App. D: no head is clipped after 30 % of the steps")
def last_clip(part: Part) -> float:
    """The last step at which any head was clipped, as a share of the run; 0 where none ever was."""
    gamma = part.trace("gamma")
    clipped = gamma[gamma < 1]
    return float(clipped.index.max() / part.steps["step"].max()) if len(clipped) else 0.0


def _largest_rate(part: Part) -> float:
    return float(part.trace("scheduled_lr").max())
