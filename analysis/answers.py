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
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from analysis.claims import SETTLED, Claim, Tested
from analysis.findings import NAN, Finding, find
from analysis.frames import Frames
from analysis.inference import SIGNIFICANT, benjamini_hochberg, holm


@dataclass(frozen=True, kw_only=True)
class Circumstance:
    """What the study knows about a claim's runs. untestable: why their tuning says nothing, "" where it does; alpha:
    the error that this look at them may spend (`inference.alpha_spent`)."""

    untestable: str = ""
    alpha: float = SIGNIFICANT


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one claim, one of `claims.ANSWERS`, and what it rests on; NaN where there is none.

    effect: in words. estimate, low, high: with the 95 % interval, in `unit`. n: seeds, or judged runs. p: of the claim
    against its opposite, two-sided; p_holm: corrected over all claims answered together. equivalence_p: of no
    difference beyond the margin. why: what keeps the answer from saying more. headline: what it says in a sentence.
    contradicts, side: the disagreement between papers, and the side that the evidence is on. own: no paper's claim.
    """

    claim: str
    source: str
    own: bool
    conditions: str
    arm: str
    n: int
    effect: str
    estimate: float
    low: float
    high: float
    unit: str
    p: float
    p_holm: float
    equivalence_p: float
    answer: str
    why: str
    headline: str
    contradicts: str
    side: str


# Of answers.json, in this order: an Answer, and what its study says of it.
ANSWER_COLUMNS = ["id", *(field.name for field in fields(Answer)), "question", "figure", "note", "command"]


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
    findings = [
        replace(finding, untestable=at.untestable or finding.untestable)
        for at, finding in zip(known, (find(claim, frames, outcomes) for claim in claims), strict=True)
    ]
    p_values = [each.p * SIGNIFICANT / at.alpha for each, at in zip(findings, known, strict=True)]
    return [
        _answer(claim, each, p_holm)
        for claim, each, p_holm in zip(claims, findings, holm(p_values), strict=True)
    ]


def correct_page(answers: pd.DataFrame) -> pd.DataFrame:
    """The answers of all experiments of a page, with `q`: Benjamini and Hochberg's correction of every test on it,
    those of a difference and those of equivalence. What is no finding at a false discovery rate of 0.05 is
    unresolved. `repeats` is the experiment that has answered from the same runs before, whose tests count once; "" is
    none."""
    table = answers.reset_index(drop=True)
    first = _first_from_same_runs(table)
    again = first.to_numpy() != np.arange(len(table))
    tests = table[["p", "equivalence_p"]].astype(float)
    tests.loc[again] = math.nan
    rates = np.array(benjamini_hochberg([*tests["p"], *tests["equivalence_p"]])).reshape(2, len(table))
    equal = (table["answer"] == "equivalent").to_numpy()
    table["q"] = np.where(equal, rates[1, first], rates[0, first])
    table["repeats"] = np.where(again, table["experiment"].reindex(first), "")
    lost = table["answer"].isin(SETTLED) & (table["q"] >= SIGNIFICANT)
    for row in table.index[lost]:
        table.loc[row, "why"] = f"one finding among many: q = {table.loc[row, 'q']:.2g} over the page"
        table.loc[row, ["answer", "headline"]] = ["unresolved", ""]
        table.loc[row, "side"] = "neither" if table.loc[row, "side"] else ""
    for row in table.index[again]:
        same = f"the same runs as in {table.loc[row, 'repeats']}, counted there"
        table.loc[row, "why"] = "; ".join(filter(None, (table.loc[row, "why"], same)))
    return table


def _first_from_same_runs(table: pd.DataFrame) -> pd.Series:
    """By row the first row with the same numbers, its own where there is none: two effects in different runs do not
    agree in ten digits; shares of runs do. Within an experiment every claim is one of its own."""
    numbers = table[["n", "unit", "estimate", "low", "high"]].astype(str)
    varied = pd.to_numeric(table["low"], errors="coerce") < pd.to_numeric(table["high"], errors="coerce")
    rows = pd.Series(table.index, index=table.index)
    first = rows.groupby([numbers[name] for name in numbers]).transform("first")
    elsewhere = table["experiment"].reindex(first).to_numpy() != table["experiment"].to_numpy()
    return first.where(varied & elsewhere & (table["unit"] != "share of runs"), rows)


def _answer(claim: Claim, finding: Finding, p_holm: float) -> Answer:
    word, why = _word(claim, finding, p_holm)
    side = claim.sides.get(word, "cannot tell" if word == "not testable" else "neither")
    return Answer(
        claim=claim.claim,
        source=claim.source,
        own=claim.own,
        conditions=", ".join(claim.side.conditions),
        arm=claim.side.arm,
        n=finding.n,
        effect=finding.effect + ("" if math.isnan(p_holm) else f", p = {p_holm:.2g}"),
        estimate=finding.estimate,
        low=finding.low,
        high=finding.high,
        unit=finding.unit,
        p=finding.p,
        p_holm=p_holm,
        equivalence_p=NAN if finding.untestable else finding.equivalence_p,
        answer=word,
        why=why,
        headline=claim.headlines.get(word, ""),
        contradicts=claim.contradicts,
        side=side if claim.contradicts else "",
    )


def _word(claim: Claim, finding: Finding, p_holm: float) -> tuple[str, str]:
    """The answer, and what keeps it from saying more."""
    if finding.untestable:
        return "not testable", finding.untestable
    if finding.equivalence_p < SIGNIFICANT:
        return "equivalent", ""
    found = not p_holm >= SIGNIFICANT  # no p: the share of the runs decides alone
    if found and finding.agree and not finding.p_for > finding.p_against:
        return "reproduced", ""
    absent = "; ".join(filter(None, (finding.lacking, finding.absent)))
    if found and finding.differ and not finding.p_against > finding.p_for:
        if finding.lacking:
            return "not seen here", absent
        # That a test fails says nothing where it is not known whether its cause was there.
        if not isinstance(claim.asked, Tested) or claim.precondition or claim.control:
            return "contradicted", ""
    if finding.absent:
        return "not seen here", absent
    if finding.p < SIGNIFICANT:
        return "unresolved", f"p = {finding.p:.2g} alone, {p_holm:.2g} among the claims of its experiment"
    return "unresolved", finding.unclear
