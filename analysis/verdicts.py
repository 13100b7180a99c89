"""Exploded, capped, recovered, spiked, diverged, collapsed, harmless, ...: words with one written test each.

The tests are applied to raw traces, never to smoothed ones. Those of one run take readings by optimizer step,
`harmless` the losses of two arms. Each returns a `Verdict`, whose `holds` is None where the run is too short or the
question does not arise: a clip that never acted is no evidence that clipping is harmless.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.frames import END_SHARE
from analysis.statistics import SMALLEST_DIFFERENCE, t_interval
from muonlab.record import spike_score

VERDICTS = (
    "exploded",
    "capped",
    "bounded",
    "recovered",
    "collapsed",
    "spiked",
    "diverged",
    "climbs",
    "falls",
)
MIN_STEPS = 10  # fewer readings than this in the part of a run that is judged: no verdict
COLLAPSED_ENTROPY = 0.05  # share of uniform attention's entropy below which a head attends to one position


@dataclass(frozen=True)
class Verdict:
    """One answer: `value` is what was compared with `threshold` (NaN where nothing could be), `sentence`
    says it."""

    name: str
    holds: bool | None
    value: float
    threshold: float
    sentence: str


def exploded(max_logit: pd.Series, warmup_steps: float, factor: float = 10.0) -> Verdict:
    """S_max ends above `factor` times its value at the end of warm-up and still rises.

    max_logit: largest scaled logit of each step. warmup_steps: the step at which the warm-up ends. The end
    value is the median of the last 5 % of the steps; rising is a positive slope of log S_max over the last
    quarter. Infinite logits have exploded.
    """
    s = max_logit.dropna()
    after = s[s.index >= (0 if math.isnan(warmup_steps) else warmup_steps)]
    quarter = s.tail(len(s) // 4)
    if len(quarter) < MIN_STEPS or not len(after) or not 0 < after.iloc[0] < math.inf:
        return _unjudged(
            "exploded", factor, f"{len(s)} steps are too few, or the logits began at or below zero"
        )
    start, end = float(after.iloc[0]), _end(s)
    ratio = end / start
    if not math.isfinite(end):
        return Verdict("exploded", True, math.inf, factor, f"the max logit grew from {start:.3g} to infinity")
    positive = quarter[(quarter > 0) & np.isfinite(quarter)]
    from scipy import stats

    slope = (
        stats.linregress(positive.index, np.log(positive)).slope if len(positive) >= MIN_STEPS else math.nan
    )
    trend = f"{100 * math.expm1(100 * slope):+.0f} % per 100 steps in the last quarter"
    sentence = f"the max logit went from {start:.3g} after warm-up to {end:.3g} ({ratio:.3g}x; {trend})"
    return Verdict("exploded", bool(ratio > factor and slope > 0), ratio, factor, sentence)


def capped(max_logit: pd.Series, tau: float) -> Verdict:
    """S_max stays within 1.1 tau in at least 95 % of the steps after it first reached tau.

    The first contact itself is not counted: the clip can only act after it.
    """
    return _contained("capped", max_logit, tau, factor=1.1, share=0.95)


def bounded(max_logit: pd.Series, tau: float) -> Verdict:
    """S_max stays within 1.3 tau in at least 99 % of the steps after first contact, and always under 1.5 tau.

    Looser than `capped`: the clip acts on the weights after a step, so the next step's forward may exceed tau by what
    one update adds, which at raised learning rates of small models is a tenth or more.
    """
    verdict = _contained("bounded", max_logit, tau, factor=1.3, share=0.99)
    if verdict.holds:
        s = max_logit.dropna()
        after = s[s.index > s.index[s >= tau][0]]
        return replace(verdict, holds=bool(after.max() < 1.5 * tau))
    return verdict


def _contained(name: str, max_logit: pd.Series, tau: float, factor: float, share: float) -> Verdict:
    s = max_logit.dropna()
    contact = s.index[s >= tau]
    if not len(contact):
        return _unjudged(
            name, share, f"the max logit never reached tau = {tau:g}, so there was nothing to cap"
        )
    after = s[s.index > contact[0]]
    if len(after) < MIN_STEPS:
        return _unjudged(name, share, f"only {len(after)} steps after the first contact with tau = {tau:g}")
    within = float((after <= factor * tau).mean())
    sentence = (
        f"{100 * within:.1f} % of the {len(after)} steps after first contact (step {contact[0]}) are within "
        f"{factor:g} tau; the largest is {after.max() / tau:.3g} tau"
    )
    return Verdict(name, within >= share, within, share, sentence)


def recovered(max_logit: pd.Series, gamma: pd.Series, tau: float) -> Verdict:
    """After having reached tau, S_max is below it and no head is clipped throughout the last 20 % of the
    steps.

    gamma: smallest clip factor of each step, NaN or 1 where nothing was clipped.
    """
    s = max_logit.dropna()
    last = s.tail(len(s) // 5)
    if len(last) < MIN_STEPS:
        return _unjudged("recovered", 1.0, f"{len(s)} steps are too few")
    if not (s.iloc[: -len(last)] >= tau).any():
        return _unjudged("recovered", 1.0, f"the max logit did not reach tau = {tau:g} before the last fifth")
    clipped = gamma.reindex(last.index).fillna(1.0) < 1
    quiet = float(((last < tau) & ~clipped).mean())
    sentence = f"{100 * quiet:.0f} % of the last {len(last)} steps are below tau = {tau:g} and unclipped"
    return Verdict("recovered", quiet == 1.0, quiet, 1.0, sentence)


def spiked(loss: pd.Series) -> Verdict:
    """OLMo 2's spike score of the raw training loss, upward and with a window for short runs, is above
    zero."""
    score = float(spike_score(loss, "olmo2", upward_only=True))
    if math.isnan(score):
        return _unjudged("spiked", 0.0, f"{len(loss)} steps are too few to score")
    return Verdict(
        "spiked", score > 0, score, 0.0, f"{score:.2g} % of the steps lie 7 sigma above the window before"
    )


def diverged(loss: pd.Series) -> Verdict:
    """The last loss is above the loss at step 0, or is not finite."""
    if len(loss) == 0 or (len(loss) == 1 and math.isfinite(loss.iloc[0])):
        return _unjudged("diverged", math.nan, f"{len(loss)} steps are too few")
    first, last = float(loss.iloc[0]), float(loss.iloc[-1])
    sentence = f"the loss went from {first:.3f} to {last:.3f} at step {loss.index[-1]}"
    return Verdict("diverged", not last <= first, last, first, sentence)


def collapsed(entropy: pd.DataFrame, context: float, share: float = 0.5) -> Verdict:
    """At least `share` of the heads end with less than 5 % of uniform attention's entropy.

    entropy: step, layer, head, entropy in nats, averaged over positions; the last reading is judged.
    Uniform causal attention over `context` positions has mean_i log i = log(context!) / context nats.
    """
    readings = entropy.dropna(subset="entropy")
    if readings.empty or math.isnan(context):
        return _unjudged("collapsed", share, "no attention entropy was recorded")
    last = readings.loc[readings["step"] == readings["step"].max(), "entropy"]
    uniform = math.lgamma(context + 1) / context
    below = float((last < COLLAPSED_ENTROPY * uniform).mean())
    sentence = (
        f"{100 * below:.0f} % of {len(last)} heads have under 5 % of uniform attention's {uniform:.2f} nats"
    )
    return Verdict("collapsed", below >= share, below, share, sentence)


def harmless(clipped: Sequence[float], baseline: Sequence[float], clipped_share: float) -> Verdict:
    """The mean paired difference in final loss lies inside ±3e-3 or the seed interval, whichever is larger.

    clipped, baseline: final losses (nats per token) of the same seeds in the same order. The seed interval
    is the half-width of the baseline's 95 % t interval. clipped_share: how often the clip acted; at 0 there
    is no verdict. A clip that helps by more than that is not "harmless" by this test either; the sentence
    says which way it went.
    """
    if clipped_share == 0:
        return _unjudged("harmless", math.nan, "the clip never acted, which is no evidence")
    if len(baseline) < 3 or len(clipped) != len(baseline):
        return _unjudged("harmless", math.nan, f"{len(baseline)} paired seeds are too few: three are needed")
    difference = float(np.mean(np.subtract(clipped, baseline)))
    interval = t_interval(baseline)
    bound = max(SMALLEST_DIFFERENCE, interval.high - interval.estimate)
    way = "no different" if abs(difference) <= bound else "better" if difference < 0 else "worse"
    sentence = (
        f"with the clip (acting on {100 * clipped_share:.1f} % of head-steps) the final loss is {way}: "
        f"{difference:+.4f} nats, bound {bound:.4f}, {len(baseline)} seeds"
    )
    return Verdict("harmless", abs(difference) <= bound, difference, bound, sentence)


def climbs(max_logit: pd.Series, at: int, within: int = 50, factor: float = 1.5) -> Verdict:
    """Within `within` steps of `at` (the clip switched off), S_max passes `factor` times its median before.

    Before is the `within` steps up to and including `at`, whose forward still saw clipped weights.
    """
    before, after = _around(max_logit, at, within)
    if len(before) < MIN_STEPS or len(after) < MIN_STEPS:
        return _unjudged("climbs", factor, f"too few steps around step {at}")
    ratio = float(after.max() / before.median())
    sentence = f"within {within} steps of step {at} the max logit rose to {ratio:.3g}x its median before"
    return Verdict("climbs", ratio > factor, ratio, factor, sentence)


def falls(loss: pd.Series, at: int, within: int = 50) -> Verdict:
    """Within `within` steps of `at` (the clip switched on again), the probe-batch loss is below the last
    reading at or before `at`. loss: the fixed probe batch, free of data noise; the last reading in reach is
    compared."""
    before, after = _around(loss, at, within)
    if not len(before) or not len(after):
        return _unjudged("falls", 0.0, f"no reading of the loss within {within} steps of step {at}")
    change = float(after.iloc[-1] - before.iloc[-1])
    sentence = f"within {within} steps of step {at} the probe loss changed by {change:+.3f} nats"
    return Verdict("falls", change < 0, change, 0.0, sentence)


def off_windows(windows: Sequence[Sequence[int]], last: int) -> list[tuple[int, int]]:
    """The gaps that `windows` leave in the steps 0 to `last`: [first, end) pairs, in order."""
    gaps, reached = [], 0
    for first, end in sorted((first, end) for first, end in windows):
        if first > reached:
            gaps.append((reached, min(first, last)))
        reached = max(reached, end)
    if reached < last:
        gaps.append((reached, last))
    return [(first, end) for first, end in gaps if first < end]


def _around(series: pd.Series, at: int, within: int) -> tuple[pd.Series, pd.Series]:
    s = series.dropna()
    return s[(s.index > at - within) & (s.index <= at)], s[(s.index > at) & (s.index <= at + within)]


def _end(series: pd.Series) -> float:
    return float(series.tail(max(1, round(END_SHARE * len(series)))).median())


def _unjudged(name: str, threshold: float, why: str) -> Verdict:
    return Verdict(name, None, math.nan, threshold, f"not judged: {why}")
