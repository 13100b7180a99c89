"""What a paper says, answered by runs: reproduced, not reproduced, opposite, tie or not testable."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.effects import Effect, at_levels, measure_effect
from analysis.frames import METRICS, Frames
from analysis.judge import judge_harmless
from analysis.measures import MEASURES, check_measure
from analysis.measures.registry import split_measure
from analysis.statistics import holm, share_interval
from analysis.verdicts import VERDICTS
from muonlab.errors import MuonlabError, unknown_name

OPPOSITE = {"lower": "higher", "higher": "lower"}
ANSWERS = ("reproduced", "not reproduced", "opposite", "tie", "not testable")
SIGNIFICANT = 0.05
KEYS = {
    "claim",
    "source",
    "condition",
    "conditions",
    "arm",
    "level",
    "levels",
    "verdict",
    "metric",
    "measure",
}
KEYS |= {
    "baseline",
    "expect",
    "as",
    "above",
    "below",
    "at_least",
    "contradicts",
    "sides",
    "figure",
    "harmless",
}


def check_claim(
    claim: Mapping[str, Any], conditions: Mapping[str, Any], searched: Sequence[str] = ()
) -> None:
    """Raises MuonlabError for a claim that no runs could answer, before any has been run.

    conditions: the experiment's. searched: those whose seeds chose a setting, and may only show a sweep's shape.
    """
    for key in claim:
        if key not in KEYS:
            raise unknown_name("key of a claim", key, KEYS)
    name = claim.get("claim", "")
    if not name or not claim.get("source"):
        raise MuonlabError(f"the claim '{name}' needs `claim` and `source`, two sentences")
    chosen = _conditions(claim)
    for side in [claim, *([claim["baseline"]] if isinstance(claim.get("baseline"), Mapping) else [])]:
        for condition in [side["condition"]] if "condition" in side else chosen:
            if condition not in conditions:
                raise unknown_name(f"condition of '{name}'", condition, conditions)
            if "arm" in side and side["arm"] not in conditions[condition]["arms"]:
                raise unknown_name(f"arm of '{name}'", side["arm"], conditions[condition]["arms"])
    if not chosen or "arm" not in claim:
        raise MuonlabError(f"the claim '{name}' needs `arm`, and `condition` or `conditions`")
    if isinstance(claim.get("baseline"), str):
        for condition in chosen:
            if claim["baseline"] not in conditions[condition]["arms"]:
                raise unknown_name(f"baseline of '{name}'", claim["baseline"], conditions[condition]["arms"])
    _check_test(claim, name)
    if set(chosen) & set(searched) and not _of_a_sweep(claim):
        raise MuonlabError(f"the claim '{name}' rests on seeds that chose a setting; judge it on fresh ones")
    for answer in claim.get("sides", ()):
        if answer not in ANSWERS:
            raise unknown_name(f"answer in `sides` of '{name}'", answer, ANSWERS)


def _check_test(claim: Mapping[str, Any], name: str) -> None:
    if "verdict" in claim:
        if claim["verdict"] not in VERDICTS:
            raise unknown_name(f"verdict of '{name}'", claim["verdict"], VERDICTS)
        if not isinstance(claim.get("expect"), bool):
            raise MuonlabError(f"the claim '{name}' expects a verdict, so `expect` is true or false")
        return
    if "harmless" in claim:
        return
    what = claim.get("measure", claim.get("metric"))
    if what is None or not ({"expect", "above", "below"} & set(claim)):
        raise MuonlabError(
            f"the claim '{name}' has no verdict, and no measure with `expect`, `above` or `below`"
        )
    if "metric" in claim and what not in METRICS:
        raise unknown_name(f"metric of '{name}'", what, METRICS)
    check_measure(what)
    if "expect" in claim:
        if claim["expect"] not in (*OPPOSITE, "tie"):
            raise unknown_name(f"`expect` of '{name}'", claim["expect"], (*OPPOSITE, "tie"))
        if "baseline" not in claim:
            raise MuonlabError(f"the claim '{name}' expects '{claim['expect']}' of no `baseline`")
    if claim.get("as", "ratio") != "ratio":
        raise unknown_name(f"`as` of '{name}'", claim["as"], ["ratio"])


def answer_all(
    claims: Sequence[Mapping[str, Any]], frames: Frames, verdicts: pd.DataFrame
) -> list[dict[str, Any]]:
    """A row of answers a claim: claim, source, arm, conditions, n, effect (in words), estimate, low, high, unit, floor,
    p, p_holm, verdict, contradicts, side.

    claim: `claim` and `source` (sentences), `condition` or `conditions`, `arm`, perhaps `level` or `levels`, and one of
    these tests (experiments/README.md says what each answer means):
    - `verdict` with `expect` (true or false): a per-run verdict that must come out so in every judged seed;
    - `metric` (a column of `Frames.runs`) or `measure` (see analysis.measures) with `above`, `below`: the 95 % interval
      over seeds must lie there; with `baseline`, that of the paired difference (or `as: ratio`);
    - `metric` or `measure` with `baseline` and `expect` ("lower", "higher" or "tie"): the paired difference over seeds,
      beyond the noise floor, with p by Holm over all such claims given, and perhaps `at_least`, a size for its mean (a
      factor for a ratio, in either direction);
    - `harmless`: the arm's loss against this baseline's (see verdicts.harmless).
    verdicts: `judge.judge_runs` and the like, with `condition`.
    """
    effects = [None if "verdict" in c or "harmless" in c else measure_effect(c, frames) for c in claims]
    adjusted = holm([e.p if e and "expect" in c else math.nan for c, e in zip(claims, effects, strict=True)])
    rows = []
    for claim, effect, p in zip(claims, effects, adjusted, strict=True):
        head = {"claim": claim["claim"], "source": claim["source"], "arm": claim["arm"]}
        head |= {"conditions": ", ".join(_conditions(claim))}
        if effect is not None:
            body = _by_effect(claim, effect, p)
        else:
            body = _by_verdict(claim, verdicts) if "verdict" in claim else _by_harm(claim, frames)
        empty = dict.fromkeys(("estimate", "low", "high", "floor", "p", "p_holm"), math.nan) | {"unit": ""}
        sides = {"contradicts": claim.get("contradicts", ""), "side": _side(claim, body["verdict"])}
        rows.append(head | empty | body | sides)
    return rows


def _by_effect(claim: Mapping[str, Any], effect: Effect, p_holm: float) -> dict[str, Any]:
    interval = effect.interval
    body = {"n": interval.n, "effect": str(effect), "unit": effect.unit, "floor": effect.floor}
    body |= {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    if effect.untestable:
        return body | {"effect": effect.untestable, "verdict": "not testable"}
    if "expect" not in claim:
        return body | {"verdict": _by_level(claim, effect)}
    words = {"p": effect.p, "p_holm": p_holm, "effect": f"{effect}, p = {p_holm:.2g}"}
    return body | words | {"verdict": _by_difference(claim, effect, p_holm)}


def _by_level(claim: Mapping[str, Any], effect: Effect) -> str:
    above, below = claim.get("above", -math.inf), claim.get("below", math.inf)
    low, high = effect.interval.low, effect.interval.high
    if math.isnan(low):
        # No interval where a value is infinite: then every seed must lie there.
        inside = [value > above and ("below" not in claim or value < below) for value in effect.values]
        return "reproduced" if all(inside) else "not reproduced" if any(inside) else "opposite"
    if low > above and high < below:
        return "reproduced"
    return "opposite" if high <= above or low >= below else "not reproduced"


def _by_difference(claim: Mapping[str, Any], effect: Effect, p_holm: float) -> str:
    estimate, expected = effect.neutral_estimate, claim["expect"]
    real = abs(estimate) > effect.floor and p_holm < SIGNIFICANT
    if expected == "tie":
        return "opposite" if real else "reproduced" if abs(estimate) <= effect.floor else "not reproduced"
    if not real:
        return "tie"
    if ("lower" if estimate < 0 else "higher") != expected:
        return "opposite"
    size = claim.get("at_least", 1 if effect.unit == "x" else 0)
    return (
        "reproduced"
        if abs(estimate) >= (math.log(size) if effect.unit == "x" else size)
        else "not reproduced"
    )


def _by_verdict(claim: Mapping[str, Any], verdicts: pd.DataFrame) -> dict[str, Any]:
    rows = verdicts[verdicts["condition"].isin(_conditions(claim))]
    rows = rows[(rows["arm"] == claim["arm"]) & (rows["name"] == claim["verdict"])]
    if {"level", "levels"} & set(claim):
        rows = rows[at_levels(rows["level"], claim)]
    judged = rows[rows["holds"].notna()]
    agree = int((judged["holds"].astype(bool) == claim["expect"]).sum())
    values = judged["value"]
    if judged.empty:
        return {"n": len(rows), "effect": "-", "verdict": "not testable"}
    held = agree if claim["expect"] else len(judged) - agree
    share = share_interval(held, len(judged))
    told = f"{claim['verdict']} in {held} of {len(judged)}, share [{share.low:.2f}, {share.high:.2f}]; "
    told += f"value {values.median():.3g} ({values.min():.3g} to {values.max():.3g})"
    verdict = "reproduced" if agree == len(judged) else "opposite" if agree == 0 else "not reproduced"
    interval = {"estimate": share.estimate, "low": share.low, "high": share.high, "unit": "share of runs"}
    return {"n": len(judged), "effect": told, "verdict": verdict} | interval


def _by_harm(claim: Mapping[str, Any], frames: Frames) -> dict[str, Any]:
    runs = frames.runs[frames.runs["condition"].isin(_conditions(claim))]
    if {"level", "levels"} & set(claim):
        without = (runs["arm"] == claim["harmless"]) & runs["level"].isna()
        runs = runs[at_levels(runs["level"], claim) | without]
    found = judge_harmless(runs, claim["arm"], claim["harmless"])
    words = {True: "reproduced", False: "not reproduced", None: "not testable"}
    return {
        "n": runs["seed"].nunique(),
        "effect": found.sentence,
        "verdict": words[found.holds],
        "unit": "nats",
    }


def _of_a_sweep(claim: Mapping[str, Any]) -> bool:
    name, _ = split_measure(claim.get("measure", ""))
    return name in MEASURES and MEASURES[name].kind != "run" and not MEASURES[name].picks


def _conditions(claim: Mapping[str, Any]) -> list[str]:
    return list(claim["conditions"]) if "conditions" in claim else [c for c in [claim.get("condition")] if c]


def _side(claim: Mapping[str, Any], verdict: str) -> str:
    if "contradicts" not in claim:
        return ""
    return claim.get("sides", {}).get(verdict, "cannot tell" if verdict == "not testable" else "neither")
