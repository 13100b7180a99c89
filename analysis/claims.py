"""What a paper says, answered by runs: reproduced, not reproduced, opposite, tie or not testable."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.archive import choose
from analysis.frames import Frames
from analysis.statistics import compare
from muonlab.errors import MuonlabError

OPPOSITE = {"lower": "higher", "higher": "lower"}


def answer(claim: Mapping[str, Any], frames: Frames, verdicts: pd.DataFrame) -> dict[str, Any]:
    """One row of the answers: claim, source, n, effect, verdict.

    claim: `claim` and `source` (sentences), `condition`, `arm`, and one of three tests. `verdict` with `expect` (true
    or false): a per-run verdict that must come out so in every judged seed. `metric` with `above` or `below`: a level
    that every run's value must pass. `metric` with `baseline` and `expect` ("lower" or "higher"): the paired
    difference over seeds, beyond the noise floor, and optionally `at_least`, a size that its mean must reach.
    verdicts: `judge.judge_runs` and the like, with `condition`.
    """
    head = {"claim": claim["claim"], "source": claim["source"]}
    if "verdict" in claim:
        return head | _by_verdict(claim, verdicts)
    if "baseline" in claim:
        return head | _by_difference(claim, frames)
    if "above" in claim or "below" in claim:
        return head | _by_level(claim, frames)
    raise MuonlabError(f"the claim '{claim['claim']}' has no verdict, baseline or level to be judged by")


def _by_verdict(claim: Mapping[str, Any], verdicts: pd.DataFrame) -> dict[str, Any]:
    rows = verdicts[
        (verdicts["condition"] == claim["condition"])
        & (verdicts["arm"] == claim["arm"])
        & (verdicts["name"] == claim["verdict"])
    ]
    judged = rows[rows["holds"].notna()]
    agree = int((judged["holds"].astype(bool) == claim["expect"]).sum())
    values = judged["value"]
    if judged.empty:
        return {"n": len(rows), "effect": "-", "verdict": "not testable"}
    spread = (
        f"{claim['verdict']} in {len(judged) - agree if not claim['expect'] else agree} of {len(judged)}; "
    )
    spread += f"value {values.median():.3g} [{values.min():.3g}, {values.max():.3g}]"
    verdict = "reproduced" if agree == len(judged) else "opposite" if agree == 0 else "not reproduced"
    return {"n": len(judged), "effect": spread, "verdict": verdict}


def _by_level(claim: Mapping[str, Any], frames: Frames) -> dict[str, Any]:
    values = choose(frames, [claim["condition"]], [claim["arm"]]).runs[claim["metric"]].dropna()
    agree = int((values > claim.get("above", -math.inf)).mul(values < claim.get("below", math.inf)).sum())
    effect = f"{claim['metric']} {values.median():.3g} [{values.min():.3g}, {values.max():.3g}]"
    verdict = "reproduced" if agree == len(values) else "opposite" if agree == 0 else "not reproduced"
    return {"n": len(values), "effect": effect, "verdict": verdict if len(values) else "not testable"}


def _by_difference(claim: Mapping[str, Any], frames: Frames) -> dict[str, Any]:
    runs = choose(frames, [claim["condition"]], [claim["arm"], claim["baseline"]]).runs
    result = compare(runs, claim["arm"], claim["baseline"], claim["metric"])
    d = result.difference
    effect = f"{claim['metric']} {d.estimate:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    if result.verdict == "untested":
        verdict = "not testable"
    elif result.verdict == claim["expect"]:
        verdict = "reproduced" if abs(d.estimate) >= claim.get("at_least", 0) else "not reproduced"
    else:
        verdict = "opposite" if result.verdict == OPPOSITE[claim["expect"]] else "tie"
    return {"n": d.n, "effect": effect, "verdict": verdict}
