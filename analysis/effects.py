"""The size of a claim's effect: a measure over seeds, or its paired difference or ratio, with its interval."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.archive import choose
from analysis.frames import Frames
from analysis.measures import MEASURES, measured, parts_by_seed
from analysis.measures.registry import Part, level_of, split_measure, unit_of
from analysis.statistics import SMALLEST_DIFFERENCE, Interval, paired_p, pooled_deviation, t_interval
from muonlab.errors import MuonlabError

NOTHING = Interval(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Effect:
    """A mean over seeds with its 95 % t interval.

    what: the measure in words. unit: of the interval; "x" where it is a ratio (a geometric mean, judged on logarithms).
    p: of the paired t test against no difference, NaN without a baseline. floor: differences up to it are ties, in the
    unit, or for a ratio in natural logarithms. values: by seed. censored: how many runs never reached what was asked
    and count with what they had spent. untestable: why nothing can be said, or "".
    """

    what: str
    unit: str
    interval: Interval
    p: float
    floor: float
    values: tuple[float, ...]
    censored: int
    untestable: str
    paired: bool

    @property
    def neutral_estimate(self) -> float:
        """The estimate on the scale on which 0 is no difference: the logarithm of a ratio."""
        return math.log(self.interval.estimate) if self.unit == "x" else self.interval.estimate

    def __str__(self) -> str:
        form = (
            "{:.3g}"
            if self.unit == "x" or not self.paired
            else "{:+.3f}"
            if self.unit == "nats"
            else "{:+.3g}"
        )
        sign = "x" if self.unit == "x" else ""
        unit = f" {self.unit}" if self.unit not in ("", "x") else ""
        if not math.isfinite(self.interval.low):
            told = ", ".join(form.format(value) for value in self.values)
            return f"{self.what} {told}{unit}"
        mean, low, high = (
            form.format(x) for x in (self.interval.estimate, self.interval.low, self.interval.high)
        )
        never = f", {self.censored} never reached" if self.censored else ""
        return f"{self.what} {sign}{mean} [{low}, {high}]{unit}{never}"


def measure_effect(claim: Mapping[str, Any], frames: Frames) -> Effect:
    """The effect that a claim with a `metric` or `measure` is about. What keeps it from being measured is said in
    `untestable`, so that one claim costs no other."""
    given = claim.get("measure", claim.get("metric"))
    unit = "x" if claim.get("as") == "ratio" else unit_of(given)
    try:
        return _effect(claim, given, unit, frames)
    except MuonlabError as error:
        return Effect(
            _words(given), unit, NOTHING, math.nan, math.nan, (), 0, str(error), "baseline" in claim
        )


def at_levels(levels: pd.Series, choice: Mapping[str, Any]) -> pd.Series:
    """Which of `levels` are the choice's `level`, or among its `levels`: numbers by value, names by text."""
    wanted = list(choice["levels"]) if "levels" in choice else [choice["level"]]
    numbers = pd.to_numeric(levels, errors="coerce")
    found = levels.astype(str).isin([str(w) for w in wanted])
    for value in wanted:
        if isinstance(value, int | float):
            found |= np.isclose(numbers, value, rtol=1e-9, atol=0)
    return found


def _effect(claim: Mapping[str, Any], given: Any, unit: str, frames: Frames) -> Effect:
    name, _ = split_measure(given)
    arm = _parts(frames, claim)
    baseline = _parts(frames, _baseline(claim, frames)) if "baseline" in claim else {}
    if name in MEASURES and MEASURES[name].kind == "pair":
        return _of_pairs(claim, given, unit, arm, baseline)
    values, censored = _values(given, arm)
    paired = bool(baseline)
    others, late = _values(given, baseline)
    if paired:
        shared = sorted(set(values) & set(others))
        values, others = ({seed: side[seed] for seed in shared} for side in (values, others))
    if not values:
        raise MuonlabError(f"no seed has a value of {_words(given)}")
    a, b = np.array(list(values.values())), np.array(list(others.values()))
    if paired:
        a, b = _bounded(a, b)
    if unit == "x":
        if (a <= 0).any() or (b <= 0).any():
            raise MuonlabError(f"{_words(given)} is not positive everywhere, so it has no ratio")
        a, b = np.log(a), np.log(b)
    differences = a - b if paired else a
    floor = pooled_deviation([a, b]) if paired else math.nan
    if paired and unit == "nats":
        floor = float(np.nanmax([floor, SMALLEST_DIFFERENCE]))
    why = _clip_never_acted(arm, baseline, list(values)) if paired else ""
    if len(differences) < 2:
        why = why or f"one {'pair of seeds' if paired else 'seed'} has no interval: two are needed"
    interval = _interval(differences, unit)
    p = paired_p(differences) if paired else math.nan
    told = tuple(np.exp(differences) if unit == "x" else differences)
    count = sum(censored[s] + late.get(s, 0) for s in values)
    return Effect(_words(given), unit, interval, p, floor if paired else math.nan, told, count, why, paired)


def _of_pairs(claim: Any, given: Any, unit: str, arm: dict[int, Part], baseline: dict[int, Part]) -> Effect:
    name, settings = split_measure(given)
    if not baseline:
        raise MuonlabError(f"measure {name} compares two arms, so the claim needs a `baseline`")
    shared = sorted(set(arm) & set(baseline))
    values = np.array([MEASURES[name].function(arm[seed], baseline[seed], **settings) for seed in shared])
    values = values[~np.isnan(values)]
    if not len(values):
        raise MuonlabError(f"no seed has a value of {_words(given)}")
    if unit == "x":
        values = np.log(values)
    told = tuple(np.exp(values) if unit == "x" else values)
    why = "one pair of seeds has no interval: two are needed" if len(values) < 2 else ""
    return Effect(_words(given), unit, _interval(values, unit), math.nan, math.nan, told, 0, why, False)


def _values(given: Any, parts: Mapping[int, Part]) -> tuple[dict[int, float], dict[int, int]]:
    """By seed the value used in calculations, NaN left out, and whether the target was never reached."""
    values, censored = {}, {}
    for seed, part in parts.items():
        value, bound = measured(given, part)
        if not math.isnan(value):
            values[seed], censored[seed] = bound, int(value != bound)
    return values, censored


def _bounded(*sides: np.ndarray) -> list[np.ndarray]:
    """Infinite values count as the largest finite one of both sides, so that no difference is overstated."""
    finite = np.concatenate(sides)[np.isfinite(np.concatenate(sides))]
    if not len(finite):
        raise MuonlabError("every value is infinite, so there is no difference to take")
    return [np.clip(side, finite.min(), finite.max()) for side in sides]


def _interval(values: np.ndarray, unit: str) -> Interval:
    if not np.isfinite(values).all():
        return Interval(float(np.median(values)), math.nan, math.nan, len(values))
    found = t_interval(values)
    if unit != "x":
        return found
    return Interval(math.exp(found.estimate), math.exp(found.low), math.exp(found.high), found.n)


def _baseline(claim: Mapping[str, Any], frames: Frames) -> Mapping[str, Any]:
    """The baseline's arm, condition and level: the claim's where it says nothing else and has levels to choose from."""
    given = claim["baseline"]
    own = dict(given) if isinstance(given, Mapping) else {"arm": given}
    kept = {key: claim[key] for key in ("arm", "condition", "conditions", "level", "levels") if key in claim}
    if {"condition", "conditions"} & set(own):
        kept = {key: value for key, value in kept.items() if key not in ("condition", "conditions")}
    runs = _runs(frames, kept | own).runs
    if {"level", "levels"} & set(own) or ("level" in runs and runs["level"].isna().all()):
        kept = {key: value for key, value in kept.items() if key not in ("level", "levels")}
    return kept | own


def _runs(frames: Frames, side: Mapping[str, Any]) -> Frames:
    return choose(frames, side["conditions"] if "conditions" in side else [side["condition"]], [side["arm"]])


def _parts(frames: Frames, side: Mapping[str, Any]) -> dict[int, Part]:
    chosen = _runs(frames, side)
    if {"level", "levels"} & set(side):
        runs = chosen.runs[at_levels(level_of(chosen.runs), side)]
        if runs.empty:
            raise MuonlabError(
                f"no run of {side['arm']} has the level {side.get('level', side.get('levels'))}"
            )
        keys = ["condition", "run"]
        steps = chosen.steps.merge(runs[keys].drop_duplicates(), on=keys)
        chosen = Frames(runs, steps, chosen.heads, chosen.events)
    return parts_by_seed(chosen)


def _clip_never_acted(arm: Mapping[int, Part], baseline: Mapping[int, Part], seeds: list[int]) -> str:
    """A clipped arm against the same optimizer without clip says nothing where no head was ever clipped."""
    runs, others = (pd.concat([side[seed].runs for seed in seeds]) for side in (arm, baseline))
    names = [set(table["optimizer"].str.removesuffix("clip")) for table in (runs, others)]
    only_one = runs["tau"].notna().all() and others["tau"].isna().all()
    if only_one and names[0] == names[1] and (runs["clipped_share"] == 0).all():
        return "the clip never acted, which is no evidence"
    return ""


def _words(given: Any) -> str:
    name, settings = split_measure(given)
    of = settings.pop("of", None)
    told = [f"{key} {value}" for key, value in settings.items()] + ([f"of {_words(of)}"] if of else [])
    return f"{name} ({', '.join(told)})" if told else name
