"""Tests of one run: exploded, capped, recovered, spiked, diverged, collapsed, ...: words with one definition each.

They are applied to raw traces, never to smoothed ones, and return an `Outcome`, whose `holds` is None where the run is
too short or the question does not arise. A new test is one function below with `@run_test`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np
import pandas as pd

from analysis.columns import at_end
from analysis.frames import Frames, rows_of
from muonlab.record import spike_score

RUN_COLUMNS = ["run", "arm", "level", "lr", "seed"]
MIN_STEPS = 10  # fewer readings than this in the judged part of a run: the test does not apply
COLLAPSED_ENTROPY = 0.05  # share of uniform attention's entropy below which a head attends to one position


@dataclass(frozen=True)
class Outcome:
    """The outcome of a test of one run: `value` was compared with `threshold` (NaN where nothing could be)."""

    name: str
    holds: bool | None
    value: float
    threshold: float
    sentence: str


@dataclass(frozen=True)
class RunTest:
    """A registered test. reads: what the function takes, by the names of `RunTraces.read`. at: "off" or "on" for a test
    of the steps around the clip's switching off or on, whose step is its last argument; "" for one of the whole run.
    value: what an outcome's value counts, in words after the number. holds_above: whether it holds for values above its
    threshold, or else for those below."""

    function: Callable[..., Outcome]
    reads: tuple[str, ...]
    at: str
    value: str
    holds_above: bool


class RunRow(Protocol):
    """A row of `Frames.runs`; it has the table's other columns too."""

    arm: str
    run: str
    tau: float


@dataclass(frozen=True)
class RunTraces:
    """One run as the tests see it: its row of `Frames.runs`, its steps indexed by step, and its heads."""

    run: RunRow
    steps: pd.DataFrame
    heads: pd.DataFrame

    @property
    def tau(self) -> float | None:
        """The clip's threshold; None for a run without one."""
        return None if pd.isna(self.run.tau) else float(self.run.tau)

    def read(self, name: str) -> object:
        """`tau`, `heads`, a column of the steps, or else of the run."""
        if name in ("tau", "heads"):
            return getattr(self, name)
        return self.steps[name] if name in self.steps else getattr(self.run, name)


RUN_TESTS: dict[str, RunTest] = {}


def run_test(
    *reads: str, value: str, at: str = "", holds_above: bool = True
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Register the function below under its name; see `RunTest`. A test that reads `tau` is skipped where there is
    none."""

    def register(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        RUN_TESTS[function.__name__] = RunTest(function, reads, at, value, holds_above)
        return function

    return register


def apply_tests(frames: Frames, windows: Sequence[Sequence[int]] | None = None) -> pd.DataFrame:
    """The outcome of every test of every run: run, arm, level, lr, seed, name, holds (True, False or None), value,
    threshold, sentence.

    windows: the steps in which the clip acts, as in the optimizer's setting; None where it is never switched, which
    leaves out the tests of switching.
    """
    # An arm's name is part of the key, since two arms of a condition may be one run.
    heads = dict(list(frames.heads.groupby(["arm", "run"])))
    steps = {key: trace.set_index("step") for key, trace in frames.steps.groupby(["arm", "run"])}
    rows = []
    for run in rows_of(frames.runs):
        key = run.arm, run.run
        traces = RunTraces(run, steps[key], heads.get(key, frames.heads.head(0)))
        identity = {column: getattr(run, column, None) for column in RUN_COLUMNS}
        rows += [identity | asdict(outcome) for outcome in _outcomes(traces, windows)]
    return pd.DataFrame(rows)


def summarise(outcomes: pd.DataFrame) -> pd.DataFrame:
    """One row per arm, level, learning rate and test: arm, level, lr, name, positive, judged, runs, value (median),
    threshold.

    positive: the runs in which the test holds, of the `judged` ones; `runs` includes those that could not be judged.
    """
    groups = outcomes.groupby(["arm", "level", "lr", "name"], sort=False, dropna=False)
    return groups.agg(
        positive=("holds", lambda holds: int(sum(each is True for each in holds))),
        judged=("holds", lambda holds: int(sum(each is not None for each in holds))),
        runs=("holds", "size"),
        value=("value", "median"),
        threshold=("threshold", "median"),
    ).reset_index()


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


def _outcomes(traces: RunTraces, windows: Sequence[Sequence[int]] | None) -> Iterator[Outcome]:
    last = int(traces.steps.index.max()) + 1 if len(traces.steps) else 0
    for test in (test for test in RUN_TESTS.values() if not test.at):
        if traces.tau is not None or "tau" not in test.reads:
            yield test.function(*map(traces.read, test.reads))
    for gap in off_windows(windows, last) if windows is not None else ():
        for test in (test for test in RUN_TESTS.values() if test.at):
            step = gap[0] if test.at == "off" else gap[1]
            if 0 < step < last:
                yield test.function(*map(traces.read, test.reads), step)


@run_test("max_logit", "warmup_steps", value="times its value after warm-up")
def exploded(max_logit: pd.Series, warmup_steps: float, factor: float = 10.0) -> Outcome:
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
    start, end = float(after.iloc[0]), at_end(s)
    ratio = end / start
    if not math.isfinite(end):
        return Outcome("exploded", True, math.inf, factor, f"the max logit grew from {start:.3g} to infinity")
    positive = quarter[(quarter > 0) & np.isfinite(quarter)]
    from scipy import stats

    slope = (
        stats.linregress(positive.index, np.log(positive)).slope if len(positive) >= MIN_STEPS else math.nan
    )
    trend = f"{100 * math.expm1(100 * slope):+.0f} % per 100 steps in the last quarter"
    sentence = f"the max logit went from {start:.3g} after warm-up to {end:.3g} ({ratio:.3g}x; {trend})"
    return Outcome("exploded", bool(ratio > factor and slope > 0), ratio, factor, sentence)


@run_test("max_logit", "tau", value="of the steps within 1.1 tau")
def capped(max_logit: pd.Series, tau: float) -> Outcome:
    """S_max stays within 1.1 tau in at least 95 % of the steps after it first reached tau.

    The first contact itself is not counted: the clip can only act after it.
    """
    return _contained("capped", max_logit, tau, factor=1.1, share=0.95)


@run_test("max_logit", "tau", value="of the steps within 1.3 tau")
def bounded(max_logit: pd.Series, tau: float) -> Outcome:
    """S_max stays within 1.3 tau in at least 99 % of the steps after first contact, and always under 1.5 tau.

    Looser than `capped`: the clip acts on the weights after a step, so the next step's forward may exceed tau by what
    one update adds, which at raised learning rates of small models is a tenth or more.
    """
    outcome = _contained("bounded", max_logit, tau, factor=1.3, share=0.99)
    if outcome.holds:
        s = max_logit.dropna()
        after = s[s.index > s.index[s >= tau][0]]
        return replace(outcome, holds=bool(after.max() < 1.5 * tau))
    return outcome


@run_test("max_logit", "gamma", "tau", value="of the last fifth below tau and unclipped")
def recovered(max_logit: pd.Series, gamma: pd.Series, tau: float) -> Outcome:
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
    return Outcome("recovered", quiet == 1.0, quiet, 1.0, sentence)


@run_test("heads", "context", value="of the heads")
def collapsed(entropy: pd.DataFrame, context: float, share: float = 0.5) -> Outcome:
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
    return Outcome("collapsed", below >= share, below, share, sentence)


@run_test("train_loss", value="% of the steps")
def spiked(loss: pd.Series) -> Outcome:
    """OLMo 2's spike score of the raw training loss, upward and with a window for short runs, is above
    zero."""
    score = float(spike_score(loss, "olmo2", upward_only=True))
    if math.isnan(score):
        return _unjudged("spiked", 0.0, f"{len(loss)} steps are too few to score")
    return Outcome(
        "spiked", score > 0, score, 0.0, f"{score:.2g} % of the steps lie 7 sigma above the window before"
    )


@run_test("train_loss", value="nats at the end")
def ended_above_start(loss: pd.Series) -> Outcome:
    """The last loss is above the loss at step 0, or is not finite."""
    if len(loss) == 0 or (len(loss) == 1 and math.isfinite(loss.iloc[0])):
        return _unjudged("ended_above_start", math.nan, f"{len(loss)} steps are too few")
    first, last = float(loss.iloc[0]), float(loss.iloc[-1])
    sentence = f"the loss went from {first:.3f} to {last:.3f} at step {loss.index[-1]}"
    return Outcome("ended_above_start", not last <= first, last, first, sentence)


@run_test("max_logit", at="off", value="times its median before")
def climbs(max_logit: pd.Series, at: int, within: int = 50, factor: float = 1.5) -> Outcome:
    """Within `within` steps of `at` (the clip switched off), S_max passes `factor` times its median before.

    Before is the `within` steps up to and including `at`, whose forward still saw clipped weights.
    """
    before, after = _around(max_logit, at, within)
    if len(before) < MIN_STEPS or len(after) < MIN_STEPS:
        return _unjudged("climbs", factor, f"too few steps around step {at}")
    ratio = float(after.max() / before.median())
    sentence = f"within {within} steps of step {at} the max logit rose to {ratio:.3g}x its median before"
    return Outcome("climbs", ratio > factor, ratio, factor, sentence)


@run_test("probe_loss", at="on", holds_above=False, value="nats")
def falls(loss: pd.Series, at: int, within: int = 50) -> Outcome:
    """Within `within` steps of `at` (the clip switched on again), the probe-batch loss is below the last
    reading at or before `at`. loss: the fixed probe batch, free of data noise; the last reading in reach is
    compared."""
    before, after = _around(loss, at, within)
    if not len(before) or not len(after):
        return _unjudged("falls", 0.0, f"no reading of the loss within {within} steps of step {at}")
    change = float(after.iloc[-1] - before.iloc[-1])
    sentence = f"within {within} steps of step {at} the probe loss changed by {change:+.3f} nats"
    return Outcome("falls", change < 0, change, 0.0, sentence)


def _contained(name: str, max_logit: pd.Series, tau: float, factor: float, share: float) -> Outcome:
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
    return Outcome(name, within >= share, within, share, sentence)


def _around(series: pd.Series, at: int, within: int) -> tuple[pd.Series, pd.Series]:
    s = series.dropna()
    return s[(s.index > at - within) & (s.index <= at)], s[(s.index > at) & (s.index <= at + within)]


def _unjudged(name: str, threshold: float, why: str) -> Outcome:
    return Outcome(name, None, math.nan, threshold, f"not judged: {why}")
