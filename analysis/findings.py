"""What the runs say about one claim: the size of its effect, what chance explains, and what they lack to say more."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.claims import MOST, Claim, Compared, Ranged, Seen, Side, Tested
from analysis.effects import Effect, measure_effect
from analysis.frames import Frames, at_levels
from analysis.inference import Region, one_sided, share_bound, share_interval
from analysis.measures import run_parts
from analysis.run_tests import RUN_TESTS
from muonlab.errors import MuonlabError

NAN = math.nan
SHARE_UNIT = "share of runs"


@dataclass(frozen=True, kw_only=True)
class Finding:
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


def find(claim: Claim, frames: Frames, outcomes: pd.DataFrame) -> Finding:
    """What the runs say about a claim. What keeps them from saying anything is in `untestable`, so that one claim costs
    no other. outcomes: of the tests of each run, as `run_tests.apply_tests` gives them, with `condition`."""
    if claim.control:
        shown = _seen(claim.control, frames, outcomes)
        seeds = [seed for seed, seen in shown.items() if seen]
        if not seeds:
            return Finding(untestable=f"its control ({claim.control}) showed it in 0 of {len(shown)} runs")
        frames, outcomes = frames.of_seeds(seeds), outcomes[outcomes["seed"].isin(seeds)]
    asked = claim.asked
    if isinstance(asked, Tested):
        finding = _of_test(asked, claim, outcomes)
    else:
        finding = _of_effect(asked, measure_effect(asked, claim.side, frames))
    untestable = claim.not_testable or finding.untestable
    return replace(finding, lacking=_lacking(claim, frames, outcomes), untestable=untestable)


def _of_effect(asked: Ranged | Compared, effect: Effect) -> Finding:
    interval = effect.interval
    finding = Finding(
        n=interval.n,
        effect=str(effect) if interval.n else "-",
        estimate=interval.estimate,
        low=interval.low,
        high=interval.high,
        unit=effect.unit,
        untestable=effect.untestable,
    )
    if effect.untestable:
        return finding
    if math.isnan(interval.low) or np.ptp(effect.values) == 0:
        # Where a value is infinite, or all are equal, there is no spread to judge by: the seeds are counted.
        region = _region(asked, logarithmic=False)
        inside = sum(map(region.holds, effect.values))
        return _by_share(finding, inside, interval.n, MOST)
    region = _region(asked, logarithmic=effect.unit == "x")
    x = np.log(effect.values) if effect.unit == "x" else np.array(effect.values)
    tails = one_sided(x, region)
    limits = sum(map(math.isfinite, (region.low, region.high)))
    finding = replace(
        finding,
        # Equivalence and a range are two one-sided tests already (Schuirmann 1987).
        p_for=tails.inside if limits == 2 else min(1.0, 2 * tails.inside),
        p_against=min(1.0, 2 * tails.outside),
    )
    if effect.paired is None or not isinstance(asked, Compared):
        return replace(finding, unclear="the interval holds values on both sides of the limit")
    if asked.at_least:
        return replace(finding, unclear="the interval holds sizes above and below the claimed one")
    if asked.expect != "equal" and not math.isnan(asked.margin):
        margin = Region(-asked.margin, asked.margin)
        finding = replace(finding, equivalence_p=one_sided(x, margin).inside)
    return replace(finding, unclear=_detectable(effect))


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
        return f"a factor of {math.exp(size):.3g} or more would have been detected (power 0.8)"
    return (
        f"a difference of {size:.3g} {effect.unit}".rstrip() + " or more would have been detected (power 0.8)"
    )


def _of_test(asked: Tested, claim: Claim, outcomes: pd.DataFrame) -> Finding:
    rows = _of_side(outcomes[outcomes["name"] == asked.test], claim.side)
    judged = rows[rows["holds"].notna()]
    if judged.empty:
        return Finding(n=len(rows), untestable=f"no run could be tested for `{asked.test}`")
    count, n = int(judged["holds"].astype(bool).sum()), len(judged)
    share, values = share_interval(count, n), judged["value"].astype(float)
    effect = f"{asked.test} in {count} of {n}, share [{share.low:.2f}, {share.high:.2f}]; "
    effect += f"median {values.median():.3g} ({values.min():.3g} to {values.max():.3g}) {RUN_TESTS[asked.test].value}"
    finding = Finding(
        n=n,
        effect=effect,
        estimate=share.estimate,
        low=share.low,
        high=share.high,
        unit=SHARE_UNIT,
    )
    as_claimed = count if asked.expect else n - count
    finding = _by_share(finding, as_claimed, n, asked.share)
    if asked.expect and not count:
        bound = share_bound(0, n)
        finding = replace(finding, absent=f"in none of {n} runs; the share may be as large as {bound:.2f}")
    if asked.share != MOST:
        return _by_count(finding, as_claimed, n, asked.share)
    return _by_value(finding, asked, values, judged["threshold"].astype(float))


def _by_share(finding: Finding, count: int, n: int, share: float) -> Finding:
    """`count` of `n` runs are as the claim says, which is about `share` of them or more: by the exact one-sided 95 %
    bounds. Half the runs need five of five."""
    whole = share_interval(count, n)
    return replace(
        finding,
        agree=1 - share_bound(n - count, n) > share,
        differ=share_bound(count, n) < share,
        unclear=f"{count} of {n} runs are as claimed, and the share may lie from"
        f" {whole.low:.2f} to {whole.high:.2f}",
    )


def _by_value(finding: Finding, asked: Tested, values: pd.Series, thresholds: pd.Series) -> Finding:
    """p of a claim about most runs: of the t test of the tested value against its threshold; none where the runs show
    no spread."""
    x = values.to_numpy() - thresholds.to_numpy()
    if len(x) < 2 or not np.isfinite(x).all() or np.ptp(x) == 0:
        return finding
    tails = one_sided(x, Region(low=0.0))
    above, below = min(1.0, 2 * tails.inside), min(1.0, 2 * tails.outside)
    claimed_above = RUN_TESTS[asked.test].holds_above == asked.expect
    p_for, p_against = (above, below) if claimed_above else (below, above)
    return replace(finding, p_for=p_for, p_against=p_against)


def _by_count(finding: Finding, count: int, n: int, share: float) -> Finding:
    """p of a claim about some runs: of the exact binomial test of their share, since how far a run passes the threshold
    says nothing of the others."""
    from scipy import stats

    more, fewer = stats.binom.sf(count - 1, n, share), stats.binom.cdf(count, n, share)
    return replace(finding, p_for=min(1.0, 2 * more), p_against=min(1.0, 2 * fewer))


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
            runs = seen.side.of(frames)
        except MuonlabError:
            return {}
        assert seen.quantity is not None
        rows, quantity = runs.runs, seen.quantity
        values = pd.Series([quantity.value(part)[0] for part in run_parts(runs)], rows.index, dtype=float)
        shown = values.between(seen.above, seen.below, inclusive="neither")
    return {int(seed): bool(each.all()) for seed, each in shown.groupby(rows["seed"])}


def _of_side(outcomes: pd.DataFrame, side: Side) -> pd.DataFrame:
    rows = outcomes[outcomes["condition"].isin(side.conditions) & (outcomes["arm"] == side.arm)]
    return rows[at_levels(rows["level"], side.levels)] if side.levels else rows
