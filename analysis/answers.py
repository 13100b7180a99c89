"""What a paper claims, answered by runs: reproduced, not reproduced, opposite, tie or not testable."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.claims import Claim, Compared, Harmless, Ranged, Side, Tested
from analysis.comparison import compare_arms, harm_margin, holm, share_interval
from analysis.effects import Effect, measure_effect
from analysis.frames import Frames, at_levels
from muonlab.errors import MuonlabError

FEWEST_PAIRS = 3  # for the test of harm


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one claim: one of `claims.ANSWERS`, and what it rests on.

    effect: in words. estimate, low, high: with the 95 % interval, in `unit`; floor: the noise floor; p, p_holm: of the
    paired t test, and corrected over all comparisons answered together. NaN where there is none. n: seeds, or judged
    runs. contradicts, side: the disagreement between papers, and the side that the evidence is on.
    """

    claim: str
    source: str
    arm: str
    conditions: str
    n: int = 0
    effect: str = "-"
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    floor: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    answer: str = "not testable"
    contradicts: str = ""
    side: str = ""


def answer_all(claims: Sequence[Claim], frames: Frames, outcomes: pd.DataFrame) -> list[Answer]:
    """Answer each claim; experiments/README.md says what each answer means.

    outcomes: of the tests of each run, as `run_tests.apply_tests` gives them, with `condition`. The p of all claims of
    a difference are corrected together, by Holm's method.
    """
    effects = {
        number: measure_effect(claim.asked, claim.side, frames)
        for number, claim in enumerate(claims)
        if isinstance(claim.asked, Ranged | Compared)
    }
    compared = [number for number in effects if isinstance(claims[number].asked, Compared)]
    corrected = dict(zip(compared, holm([effects[number].p for number in compared]), strict=True))
    answers = []
    for number, claim in enumerate(claims):
        empty = Answer(
            claim=claim.claim,
            source=claim.source,
            arm=claim.side.arm,
            conditions=", ".join(claim.side.conditions),
            contradicts=claim.contradicts,
        )
        asked = claim.asked
        if isinstance(asked, Tested):
            answer = replace(empty, **_of_test(asked, claim.side, outcomes))
        elif isinstance(asked, Harmless):
            answer = replace(empty, **_of_harm(asked, claim.side, frames))
        else:
            answer = replace(empty, **_of_effect(asked, effects[number], corrected.get(number, math.nan)))
        answers.append(replace(answer, side=_whose(claim, answer.answer)))
    return answers


def _of_effect(asked: Ranged | Compared, effect: Effect, p_holm: float) -> dict[str, Any]:
    interval = effect.interval
    body = {"n": interval.n, "effect": effect.untestable or str(effect), "unit": effect.unit}
    body |= {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    body |= {"floor": effect.paired.floor} if effect.paired else {}
    if effect.untestable:
        return body
    if isinstance(asked, Ranged):
        return body | {"answer": _in_range(asked, effect)}
    words = {"p": effect.p, "p_holm": p_holm, "effect": f"{effect}, p = {p_holm:.2g}"}
    return body | words | {"answer": _by_difference(asked, effect, p_holm)}


def _in_range(asked: Ranged, effect: Effect) -> str:
    above = -math.inf if asked.above is None else asked.above
    below = math.inf if asked.below is None else asked.below
    low, high = effect.interval.low, effect.interval.high
    if math.isnan(low):
        # There is no interval where a value is infinite: then every seed must lie in the range.
        inside = [value > above and (asked.below is None or value < below) for value in effect.values]
        return "reproduced" if all(inside) else "not reproduced" if any(inside) else "opposite"
    if low > above and high < below:
        return "reproduced"
    return "opposite" if high <= above or low >= below else "not reproduced"


def _by_difference(asked: Compared, effect: Effect, p_holm: float) -> str:
    paired = effect.paired
    assert paired is not None, "a claim of a difference is measured with its baseline"
    direction = paired.direction(p_holm)
    if asked.expect == "tie":
        if direction != "tie":
            return "opposite"
        return "reproduced" if paired.within(paired.floor) else "not reproduced"
    if direction == "tie":
        return "tie"
    if direction != asked.expect:
        return "opposite"
    size = asked.at_least or 0.0
    if effect.unit == "x":
        size = math.log(asked.at_least or 1.0)
    return "reproduced" if abs(paired.difference.estimate) >= size else "not reproduced"


def _of_test(asked: Tested, side: Side, outcomes: pd.DataFrame) -> dict[str, Any]:
    rows = outcomes[outcomes["condition"].isin(side.conditions)]
    rows = rows[(rows["arm"] == side.arm) & (rows["name"] == asked.test)]
    if side.levels:
        rows = rows[at_levels(rows["level"], side.levels)]
    judged = rows[rows["holds"].notna()]
    if judged.empty:
        return {"n": len(rows)}
    positive = int(judged["holds"].astype(bool).sum())
    share, values = share_interval(positive, len(judged)), judged["value"]
    effect = f"{asked.test} in {positive} of {len(judged)}, share [{share.low:.2f}, {share.high:.2f}]; "
    effect += f"value {values.median():.3g} ({values.min():.3g} to {values.max():.3g})"
    agree = positive if asked.expect else len(judged) - positive
    answer = "reproduced" if agree == len(judged) else "opposite" if agree == 0 else "not reproduced"
    interval = {"estimate": share.estimate, "low": share.low, "high": share.high, "unit": "share of runs"}
    return {"n": len(judged), "effect": effect, "answer": answer} | interval


def _of_harm(asked: Harmless, side: Side, frames: Frames) -> dict[str, Any]:
    """The mean paired difference in final loss lies inside ± `harm_margin`, whichever way it goes."""
    runs = pd.concat([_runs_of(frames, each) for each in (side, asked.baseline)])
    seeds = runs.loc[runs["loss"].notna()].groupby("arm")["seed"].agg(set)
    pairs = len(seeds.get(side.arm, set()) & seeds.get(asked.baseline.arm, set()))
    acted = runs.loc[runs["arm"] == side.arm, "clipped_share"].mean()
    body = {"n": runs["seed"].nunique(), "unit": "nats"}
    if not acted > 0:
        return body | {"effect": "not judged: the clip never acted, which is no evidence"}
    if pairs < FEWEST_PAIRS:
        return body | {"effect": f"not judged: {pairs} paired seeds are too few: three are needed"}
    paired = compare_arms(runs, side.arm, asked.baseline.arm)
    losses = runs[runs["arm"] == asked.baseline.arm].set_index("seed")["loss"]
    margin = harm_margin(losses[list(paired.seeds)])
    mean = paired.difference.estimate
    way = "no different" if paired.within(margin) else "better" if mean < 0 else "worse"
    effect = (
        f"with the clip (acting on {100 * acted:.1f} % of head-steps) the final loss is {way}: "
        f"{mean:+.4f} nats, bound {margin:.4f}, {pairs} seeds"
    )
    return body | {"effect": effect, "answer": "reproduced" if paired.within(margin) else "not reproduced"}


def _runs_of(frames: Frames, side: Side) -> pd.DataFrame:
    try:
        return side.of(frames).runs
    except MuonlabError:
        return frames.runs.head(0)


def _whose(claim: Claim, answer: str) -> str:
    if not claim.contradicts:
        return ""
    return claim.sides.get(answer, "cannot tell" if answer == "not testable" else "neither")
