"""The verdicts of many runs as one table, and their summary by arm."""

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from analysis.frames import Frames, rows_of
from analysis.verdicts import (
    Verdict,
    bounded,
    capped,
    climbs,
    collapsed,
    diverged,
    exploded,
    falls,
    harmless,
    off_windows,
    recovered,
    spiked,
)

RUN_COLUMNS = ["run", "arm", "level", "lr", "seed"]


def judge_runs(frames: Frames, tau: float | None = None) -> pd.DataFrame:
    """Every per-run verdict: run, arm, level, lr, seed, name, holds (True, False or None), value, threshold,
    sentence.

    tau: the threshold that arms without one are measured against in `capped`, `bounded` and `recovered`;
    None: their own alone, and no such verdict for arms without a clip.
    """
    # An arm's name is part of the key, since two arms of a condition may be one run.
    heads, rows = dict(list(frames.heads.groupby(["arm", "run"]))), []
    steps = {key: trace.set_index("step") for key, trace in frames.steps.groupby(["arm", "run"])}
    for run in rows_of(frames.runs):
        trace = steps[run.arm, run.run]
        verdicts = [
            exploded(trace["max_logit"], run.warmup_steps),
            collapsed(heads[run.arm, run.run], run.context),
            spiked(trace["train_loss"]),
            diverged(trace["train_loss"]),
        ]
        threshold = tau if pd.isna(run.tau) else run.tau
        if threshold is not None:
            verdicts[1:1] = [
                capped(trace["max_logit"], threshold),
                bounded(trace["max_logit"], threshold),
                recovered(trace["max_logit"], trace["gamma"], threshold),
            ]
        rows += [_row(run, verdict) for verdict in verdicts]
    return pd.DataFrame(rows)


def judge_switch(frames: Frames, windows: Sequence[Sequence[int]], within: int = 50) -> pd.DataFrame:
    """`climbs` where the clip goes off and `falls` where it comes on again, for every run; columns of
    `judge_runs`.

    windows: the steps in which the clip acts, as in the optimizer's setting.
    """
    rows = []
    for run in rows_of(frames.runs):
        steps = frames.steps
        trace = steps[(steps["arm"] == run.arm) & (steps["run"] == run.run)].set_index("step")
        last = int(trace.index.max()) + 1
        for off, on in off_windows(windows, last):
            if off > 0:
                rows.append(_row(run, climbs(trace["max_logit"], off, within)))
            if on < last:
                rows.append(_row(run, falls(trace["probe_loss"], on, within)))
    return pd.DataFrame(rows)


def judge_harmless(runs: pd.DataFrame, arm: str, baseline: str, metric: str = "loss") -> Verdict:
    """`harmless` for `arm` against `baseline` over the seeds that both have. runs: `Frames.runs` at one
    setting."""
    both = [runs[runs["arm"] == name].set_index("seed") for name in (arm, baseline)]
    seeds = sorted(set(both[0][metric].dropna().index) & set(both[1][metric].dropna().index))
    losses, baselines = (rows.loc[seeds, metric].tolist() for rows in both)
    return harmless(losses, baselines, both[0]["clipped_share"].mean() if len(both[0]) else 0.0)


def summarise(verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row per arm, level, learning rate and verdict: arm, level, lr, name, held, judged, runs, value (median),
    threshold.

    `held` of `judged` runs; `runs` counts those that could not be judged too.
    """
    groups = verdicts.groupby(["arm", "level", "lr", "name"], sort=False, dropna=False)
    return groups.agg(
        held=("holds", lambda answers: int(sum(answer is True for answer in answers))),
        judged=("holds", lambda answers: int(sum(answer is not None for answer in answers))),
        runs=("holds", "size"),
        value=("value", "median"),
        threshold=("threshold", "median"),
    ).reset_index()


def _row(run: object, verdict: Verdict) -> dict[str, object]:
    return {column: getattr(run, column, None) for column in RUN_COLUMNS} | asdict(verdict)
