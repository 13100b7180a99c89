"""What a paper claims, answered by runs. An answer says no more than its interval, its control and its power allow.

reproduced      the claim lies in the interval, and chance does not explain it
contradicted    the interval excludes the claim, although what the claim needs was there
equivalent      a difference was claimed, and there is none larger than the margin
unresolved      none of these; `why` has the smallest difference that would have been seen
not seen here   absent, in too few runs or without what it needs; `why` has the largest share that is possible
not testable    these runs cannot answer; `why` says what they lack
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.claims import SETTLED, Claim, Compared, Ranged, Seen, Side, Tested
from analysis.effects import Effect, measure_effect
from analysis.frames import Frames, at_levels
from analysis.inference import (
    SIGNIFICANT,
    Region,
    benjamini_hochberg,
    holm,
    one_sided,
    share_bound,
    share_interval,
)
from analysis.run_tests import RUN_TESTS
from muonlab.errors import MuonlabError

NAN = math.nan
SHARE_UNIT = "share of runs"


@dataclass(frozen=True, kw_only=True)
class Circumstance:
    """What the study knows about a claim's runs. untestable: why their tuning says nothing, "" where it does; alpha:
    the error that this look at them may spend (`inference.alpha_spent`)."""

    untestable: str = ""
    alpha: float = SIGNIFICANT


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one claim, one of `claims.ANSWERS`, and what it rests on; NaN where there is none.

    effect: in words. estimate, low, high: with the 95 % interval, in `unit`. p: of the claim against its opposite,
    two- sided; equivalence_p: of no difference beyond the margin. p_holm: p corrected over all claims answered
    together; q: the false discovery rate among all tests of a page, 1 until there is a page (`correct_page`). n:
    seeds, or judged runs. why: what keeps the answer from saying more. headline: what it says in a sentence.
    contradicts, side: the disagreement between papers, and the side that the evidence is on. own: no paper's claim.
    """

    claim: str
    source: str
    arm: str
    conditions: str
    own: bool
    n: int = 0
    effect: str = "-"
    estimate: float = NAN
    low: float = NAN
    high: float = NAN
    unit: str = ""
    p: float = NAN
    p_holm: float = NAN
    equivalence_p: float = NAN
    answer: str = "not testable"
    why: str = ""
    headline: str = ""
    contradicts: str = ""
    side: str = ""


# Of answers.json, in this order: an Answer, and what its study says of it.
ANSWER_COLUMNS = [
    *(
        "id",
        "claim",
        "source",
        "own",
        "question",
        "conditions",
        "arm",
        "n",
        "effect",
        "estimate",
        "low",
        "high",
    ),
    *("unit", "p", "p_holm", "equivalence_p", "answer", "why", "headline", "contradicts", "side", "figure"),
    *("note", "command"),
]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured for one claim, before several are corrected together.

    p_for, p_against: two-sided p of the claim and of its opposite, NaN where the runs show no spread to judge by.
    agree, differ: whether, beside its p, enough runs are for or against it. absent: in words, of what no run showed;
    lacking: what the mechanism needs and the runs did not show; unclear: what they would have shown. untestable: why
    they cannot answer at all.
    """

    n: int = 0
    effect: str = "-"
    estimate: float = NAN
    low: float = NAN
    high: float = NAN
    unit: str = ""
    p_for: float = NAN
    p_against: float = NAN
    equivalence_p: float = NAN
    agree: bool = True
    differ: bool = True
    absent: str = ""
    lacking: str = ""
    unclear: str = ""
    untestable: str = ""

    @property
    def p(self) -> float:
        """Of the statement that the runs are for."""
        return NAN if self.untestable else float(np.fmin(self.p_for, self.p_against))


def answer_all(
    claims: Sequence[Claim],
    frames: Frames,
    outcomes: pd.DataFrame,
    circumstances: Sequence[Circumstance] | None = None,
) -> list[Answer]:
    """Answer each claim; the p of all are corrected together, by Holm's method.

    outcomes: of the tests of each run, as `run_tests.apply_tests` gives them, with `condition`. circumstances: one per
    claim; None: nothing speaks against any.
    """
    known = circumstances or [Circumstance()] * len(claims)
    evidence = [_gather(claim, at, frames, outcomes) for claim, at in zip(claims, known, strict=True)]
    p_values = [each.p * SIGNIFICANT / at.alpha for each, at in zip(evidence, known, strict=True)]
    return [
        _answer(claim, each, p_holm)
        for claim, each, p_holm in zip(claims, evidence, holm(p_values), strict=True)
    ]


def correct_page(answers: pd.DataFrame) -> pd.DataFrame:
    """The answers of all experiments of a page, with `q`: Benjamini and Hochberg's correction of every test on it,
    those of a difference and those of equivalence. What is no finding at a false discovery rate of 0.05 is
    unresolved."""
    table = answers.reset_index(drop=True)
    tests = pd.concat([table["p"], table["equivalence_p"]]).astype(float)
    rates = np.array(benjamini_hochberg(tests.tolist()))
    equal = (table["answer"] == "equivalent").to_numpy()
    table["q"] = np.where(equal, rates[len(table) :], rates[: len(table)])
    lost = table["answer"].isin(SETTLED) & (table["q"] >= SIGNIFICANT)
    for row in table.index[lost]:
        table.loc[row, "why"] = f"one finding among many: q = {table.loc[row, 'q']:.2g} over the page"
        table.loc[row, ["answer", "headline"]] = ["unresolved", ""]
        table.loc[row, "side"] = "neither" if table.loc[row, "side"] else ""
    return table


# ---------------------------------------------------------------- evidence
def _gather(claim: Claim, at: Circumstance, frames: Frames, outcomes: pd.DataFrame) -> Evidence:
    if claim.control:
        shown = _seen(claim.control, frames, outcomes)
        seeds = [seed for seed, seen in shown.items() if seen]
        if not seeds:
            return Evidence(untestable=f"its control ({claim.control}) showed it in 0 of {len(shown)} runs")
        frames, outcomes = frames.of_seeds(seeds), outcomes[outcomes["seed"].isin(seeds)]
    asked = claim.asked
    if isinstance(asked, Tested):
        evidence = _of_test(asked, claim, outcomes)
    else:
        evidence = _of_effect(asked, measure_effect(asked, claim.side, frames))
    untestable = claim.not_testable or at.untestable or evidence.untestable
    return replace(evidence, lacking=_lacking(claim, frames, outcomes), untestable=untestable)


def _of_effect(asked: Ranged | Compared, effect: Effect) -> Evidence:
    interval = effect.interval
    evidence = Evidence(
        n=interval.n,
        effect=str(effect) if interval.n else "-",
        estimate=interval.estimate,
        low=interval.low,
        high=interval.high,
        unit=effect.unit,
        untestable=effect.untestable,
    )
    if effect.untestable:
        return evidence
    if math.isnan(interval.low) or np.ptp(effect.values) == 0:
        # Where a value is infinite, or all are equal, there is no spread to judge by: the seeds are counted.
        region = _region(asked, logarithmic=False)
        inside = sum(map(region.holds, effect.values))
        return replace(evidence, **_by_share(inside, interval.n, 0.5))
    region = _region(asked, logarithmic=effect.unit == "x")
    x = np.log(effect.values) if effect.unit == "x" else np.array(effect.values)
    tails = one_sided(x, region)
    limits = sum(map(math.isfinite, (region.low, region.high)))
    evidence = replace(
        evidence,
        # Equivalence and a range are two one-sided tests already (Schuirmann 1987).
        p_for=tails.inside if limits == 2 else min(1.0, 2 * tails.inside),
        p_against=min(1.0, 2 * tails.outside),
    )
    if effect.paired is None or not isinstance(asked, Compared):
        return replace(evidence, unclear="the interval holds values on both sides of the limit")
    if asked.at_least:
        return replace(evidence, unclear="the interval holds sizes above and below the claimed one")
    if asked.expect != "equal" and not math.isnan(asked.margin):
        margin = Region(-asked.margin, asked.margin)
        evidence = replace(evidence, equivalence_p=one_sided(x, margin).inside)
    return replace(evidence, unclear=_detectable(effect))


def _region(asked: Ranged | Compared, logarithmic: bool) -> Region:
    """Where the claim says that the mean lies: of values or differences, or of the logarithms of ratios."""
    if isinstance(asked, Compared):
        low, high = {
            "lower": (-math.inf, -asked.at_least),
            "higher": (asked.at_least, math.inf),
            "equal": (-asked.margin, asked.margin),
        }[asked.expect]
        # A comparison keeps its sizes as differences, of logarithms for a ratio.
        return Region(low, high) if logarithmic or not asked.ratio else Region(math.exp(low), math.exp(high))
    low = -math.inf if asked.above is None else asked.above
    high = math.inf if asked.below is None else asked.below
    if logarithmic:
        return Region(math.log(low) if low > 0 else -math.inf, math.log(high))
    return Region(low, high)


def _detectable(effect: Effect) -> str:
    assert effect.paired is not None
    size = effect.paired.detectable
    if effect.unit == "x":
        return f"a factor of {math.exp(size):.3g} would have been seen"
    return f"a difference of {size:.3g} {effect.unit}".rstrip() + " would have been seen"


def _of_test(asked: Tested, claim: Claim, outcomes: pd.DataFrame) -> Evidence:
    rows = _of_side(outcomes[outcomes["name"] == asked.test], claim.side)
    judged = rows[rows["holds"].notna()]
    if judged.empty:
        return Evidence(n=len(rows), untestable=f"no run could be tested for `{asked.test}`")
    count, n = int(judged["holds"].astype(bool).sum()), len(judged)
    share, values = share_interval(count, n), judged["value"].astype(float)
    effect = f"{asked.test} in {count} of {n}, share [{share.low:.2f}, {share.high:.2f}]; "
    effect += f"value {values.median():.3g} ({values.min():.3g} to {values.max():.3g})"
    evidence = Evidence(
        n=n,
        effect=effect,
        estimate=share.estimate,
        low=share.low,
        high=share.high,
        unit=SHARE_UNIT,
        **_by_share(count if asked.expect else n - count, n, asked.share),
    )
    if asked.expect and not count:
        bound = share_bound(0, n)
        evidence = replace(evidence, absent=f"in none of {n} runs; the share may be as large as {bound:.2f}")
    return replace(evidence, **_by_value(asked, values, judged["threshold"].astype(float)))


def _by_share(count: int, n: int, share: float) -> dict[str, Any]:
    """`count` of `n` runs are as the claim says, which is about `share` of them or more."""
    every, none = 1 - share_bound(0, n), share_bound(count, n)
    unclear = f"{count} of {n} runs are as claimed, and the share may lie from "
    whole = share_interval(count, n)
    return {
        "agree": count == n and every > 0.5,
        "differ": none < share,
        "unclear": unclear + f"{whole.low:.2f} to {whole.high:.2f}",
    }


def _by_value(asked: Tested, values: pd.Series, thresholds: pd.Series) -> dict[str, Any]:
    """p of the t test of the tested value against its threshold; none where the runs show no spread."""
    x = values.to_numpy() - thresholds.to_numpy()
    if len(x) < 2 or not np.isfinite(x).all() or np.ptp(x) == 0:
        return {}
    tails = one_sided(x, Region(low=0.0))
    above, below = min(1.0, 2 * tails.inside), min(1.0, 2 * tails.outside)
    holds_above = RUN_TESTS[asked.test].holds_above
    claimed_above = holds_above == asked.expect
    return {"p_for": above if claimed_above else below, "p_against": below if claimed_above else above}


def _lacking(claim: Claim, frames: Frames, outcomes: pd.DataFrame) -> str:
    """What the mechanism needs and some judged run did not show; "" where all did, or nothing is asked for."""
    if claim.precondition is None:
        return ""
    shown = _seen(claim.precondition, frames, outcomes)
    count = sum(shown.values())
    if shown and count == len(shown):
        return ""
    return f"what it needs ({claim.precondition}) was there in {count} of {len(shown)} runs"


def _seen(seen: Seen, frames: Frames, outcomes: pd.DataFrame) -> dict[int, bool]:
    """{seed: whether all of its runs on that side showed it}."""
    if seen.test:
        rows = _of_side(outcomes[outcomes["name"] == seen.test], seen.side)
        shown = rows["holds"].map(lambda holds: not pd.isna(holds) and bool(holds) == seen.expect)
    else:
        try:
            rows = seen.side.of(frames).runs
        except MuonlabError:
            return {}
        shown = rows[seen.metric].between(seen.above, seen.below, inclusive="neither")
    return {int(seed): bool(each.all()) for seed, each in shown.groupby(rows["seed"])}


def _of_side(outcomes: pd.DataFrame, side: Side) -> pd.DataFrame:
    rows = outcomes[outcomes["condition"].isin(side.conditions) & (outcomes["arm"] == side.arm)]
    return rows[at_levels(rows["level"], side.levels)] if side.levels else rows


# ---------------------------------------------------------------- from evidence to an answer
def _answer(claim: Claim, evidence: Evidence, p_holm: float) -> Answer:
    word, why = _word(claim, evidence, p_holm)
    side = claim.sides.get(word, "cannot tell" if word == "not testable" else "neither")
    return Answer(
        claim=claim.claim,
        source=claim.source,
        arm=claim.side.arm,
        conditions=", ".join(claim.side.conditions),
        own=claim.own,
        n=evidence.n,
        effect=evidence.effect + ("" if math.isnan(p_holm) else f", p = {p_holm:.2g}"),
        estimate=evidence.estimate,
        low=evidence.low,
        high=evidence.high,
        unit=evidence.unit,
        p=evidence.p,
        p_holm=p_holm,
        equivalence_p=NAN if evidence.untestable else evidence.equivalence_p,
        answer=word,
        why=why,
        headline=claim.headlines.get(word, ""),
        contradicts=claim.contradicts,
        side=side if claim.contradicts else "",
    )


def _word(claim: Claim, evidence: Evidence, p_holm: float) -> tuple[str, str]:
    """The answer, and what keeps it from saying more."""
    if evidence.untestable:
        return "not testable", evidence.untestable
    if evidence.equivalence_p < SIGNIFICANT:
        return "equivalent", ""
    found = not p_holm >= SIGNIFICANT  # no p: the share of the runs decides alone
    if found and evidence.agree and not evidence.p_for > evidence.p_against:
        return "reproduced", ""
    absent = "; ".join(filter(None, (evidence.lacking, evidence.absent)))
    if found and evidence.differ and not evidence.p_against > evidence.p_for:
        if evidence.lacking:
            return "not seen here", absent
        # That a test fails says nothing where it is not known whether its cause was there.
        if not isinstance(claim.asked, Tested) or claim.precondition or claim.control:
            return "contradicted", ""
    if evidence.absent:
        return "not seen here", absent
    if evidence.p < SIGNIFICANT:
        return "unresolved", f"p = {evidence.p:.2g} alone, {p_holm:.2g} among the claims of its experiment"
    return "unresolved", evidence.unclear
