"""The size of a claim's effect: a quantity's mean over seeds, or its paired difference or ratio, with its interval."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.claims import Compared, Ranged, Side
from analysis.columns import LOST
from analysis.comparison import Paired, Sample, compare
from analysis.frames import Frames
from analysis.inference import Interval, t_interval
from analysis.measures import Part, Quantity, parts_by_seed
from muonlab.errors import MuonlabError

NOTHING = Interval(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Effect:
    """A measured quantity, with the 95 % t interval of its mean over seeds.

    unit: of values and interval; "x" for a ratio, whose interval is that of a geometric mean. values: one per seed.
    paired: the comparison with the baseline, None where there is none. censored: how many runs never reached their
    target and count with what they had spent. untestable: why nothing can be said; "" where something can.
    """

    quantity: Quantity
    unit: str
    values: tuple[float, ...] = ()
    interval: Interval = NOTHING
    paired: Paired | None = None
    censored: int = 0
    untestable: str = ""

    @property
    def p(self) -> float:
        """Of the paired t test; NaN without a comparison."""
        return self.paired.p if self.paired else math.nan

    def __str__(self) -> str:
        signed = self.paired is not None and self.unit != "x"
        form = ("{:+.3f}" if self.unit == "nats" else "{:+.3g}") if signed else "{:.3g}"
        unit = f" {self.unit}" if self.unit not in ("", "x") else ""
        if not math.isfinite(self.interval.low):
            return f"{self.quantity} {', '.join(map(form.format, self.values))}{unit}"
        mean, low, high = map(form.format, (self.interval.estimate, self.interval.low, self.interval.high))
        never = f", {self.censored} never reached" if self.censored else ""
        return f"{self.quantity} {'x' if self.unit == 'x' else ''}{mean} [{low}, {high}]{unit}{never}"


def measure_effect(asked: Ranged | Compared, side: Side, frames: Frames) -> Effect:
    """The effect that a claim is about. What prevents measuring it is said in `untestable`, so that one claim costs no
    other."""
    unit = "x" if asked.ratio else asked.quantity.unit
    try:
        arm = parts_by_seed(side.of(frames))
        if asked.baseline is None:
            return _mean(asked.quantity, unit, _sample(asked.quantity, arm))
        baseline = parts_by_seed(asked.baseline.of(frames))
        if asked.quantity.kind == "pair":
            shared = sorted(set(arm) & set(baseline))
            values = {seed: asked.quantity.of_pair(arm[seed], baseline[seed]) for seed in shared}
            return _mean(asked.quantity, unit, _Values(Sample(_known(values)), {}))
        return _difference(asked.quantity, unit, arm, baseline)
    except MuonlabError as error:
        return Effect(asked.quantity, unit, untestable=str(error))


@dataclass(frozen=True)
class _Values:
    """A quantity by seed, and which seeds' runs never reached their target (1) or did (0)."""

    sample: Sample
    censored: Mapping[int, int]


def _mean(quantity: Quantity, unit: str, values_by_seed: _Values) -> Effect:
    values = np.array(list(values_by_seed.sample.by_seed.values()))
    if not len(values):
        raise MuonlabError(f"no seed has a value of {quantity}")
    if not np.isfinite(values).all():
        interval = Interval(float(np.median(values)), math.nan, math.nan, len(values))
    elif unit != "x":
        interval = t_interval(values)
    elif (values > 0).all():
        interval = t_interval(np.log(values)).exp()
    else:
        raise MuonlabError(f"{quantity} is not positive everywhere, so it has no geometric mean")
    why = "one seed has no interval: two are needed" if len(values) < 2 else ""
    return Effect(quantity, unit, tuple(values), interval, None, sum(values_by_seed.censored.values()), why)


def _difference(quantity: Quantity, unit: str, arm: dict[int, Part], baseline: dict[int, Part]) -> Effect:
    ours, theirs = _sample(quantity, arm), _sample(quantity, baseline)
    paired = compare(ours.sample, theirs.sample, unit, str(quantity))
    values, interval = paired.differences, paired.difference
    if unit == "x":
        values, interval = np.exp(values), interval.exp()
    why = _nothing_acted(arm, baseline, paired.seeds)
    if len(values) < 2:
        why = why or "one pair of seeds has no interval: two are needed"
    censored = sum(side.censored[seed] for side in (ours, theirs) for seed in paired.seeds)
    return Effect(quantity, unit, tuple(values), interval, paired, censored, why)


def _sample(quantity: Quantity, parts: Mapping[int, Part]) -> _Values:
    """The values used in calculations, NaN left out; a seed is lost where its only run is."""
    pairs = {seed: quantity.value(part) for seed, part in parts.items()}
    values = _known({seed: bound for seed, (value, bound) in pairs.items() if not math.isnan(value)})
    lost = {s for s, part in parts.items() if len(part.runs) == 1 and part.runs["status"].iloc[0] in LOST}
    censored = {seed: int(pairs[seed][0] != pairs[seed][1]) for seed in values}
    return _Values(Sample(values, frozenset(lost)), censored)


def _known(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if not math.isnan(value)}


def _nothing_acted(arm: Mapping[int, Part], baseline: Mapping[int, Part], seeds: tuple[int, ...]) -> str:
    """Two arms whose runs are the same to the bit say nothing: a clip, for instance, that never acted."""
    runs, others = (pd.concat([side[seed].runs for seed in seeds]) for side in (arm, baseline))
    marks = [mark for mark in ("loss", "max_logit") if mark in runs]
    if len(runs) == len(others) and all(np.array_equal(runs[mark], others[mark], True) for mark in marks):
        return "the runs of both arms are the same to the bit: what tells them apart never acted"
    return ""
