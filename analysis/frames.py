"""Tidy tables of many runs, which everything else in `analysis` reads."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from muonlab.errors import MuonlabError
from muonlab.record import Run, load_run

# What every row of `steps`, `heads` and `events` repeats of its run, so that a figure needs one table only.
IDENTITY = ["run", "arm", "optimizer", "lr", "seed", "status"]
END_SHARE = 0.05  # "at the end" is the median over this last share of a run's steps


@dataclass(frozen=True)
class Frames:
    """Four tables that share the column `run` (the folder's name).

    runs: one row a run: run, folder, arm, optimizer, lr, weight_decay, tau, seed, status, cause, num_steps,
        warmup_steps, context, tokens, flops, seconds, initial_loss, val_loss, probe_loss, val_bits_per_byte
        (the last readings of a finished run; NaN for one that diverged or was cut short), loss
        (`settled_loss`), max_logit (largest of all steps and heads), end_max_logit, end_entropy (nats),
        clipped_share (share of (step, head) pairs scaled down).
    steps: one row a step: the run's identity and its recorded columns, with max_logit (largest of all heads),
        gamma (smallest of all heads) and entropy (mean of all heads, nats) of that step, NaN where nothing
        was recorded.
    heads: step, layer, head, value, value_abs, gamma, entropy with the run's identity.
    events: the recorded spike events with the run's identity.
    """

    runs: pd.DataFrame
    steps: pd.DataFrame
    heads: pd.DataFrame
    events: pd.DataFrame


def collect(folders: Iterable[str | Path] | Mapping[str, Iterable[str | Path]]) -> Frames:
    """Read run folders into `Frames`.

    `folders` is either a list, in which case a run's arm is its optimizer's name, or {arm: folders}. The
    order given is kept: it is the order of legends and tables. Raises MuonlabError where there is no run at
    all.
    """
    if not isinstance(folders, Mapping):
        folders = {"": folders}
    labelled = [(arm, Path(folder)) for arm, group in folders.items() for folder in group]
    if not labelled:
        raise MuonlabError("no run folder was given, so there is nothing to analyse")
    tables = [_tables(load_run(folder), folder, arm) for arm, folder in labelled]
    return Frames(*(pd.concat(parts, ignore_index=True) for parts in zip(*tables, strict=True)))


def _tables(run: Run, folder: Path, arm: str) -> tuple[pd.DataFrame, ...]:
    optimizer = run.config["optimizer"]
    identity = {
        "run": folder.name,
        "arm": arm or optimizer["name"],
        "optimizer": optimizer["name"],
        "lr": float(optimizer["lr"]),
        "seed": int(run.config["seed"]),
        "status": run.status,
    }
    steps = run.steps.merge(_over_heads(run.max_logits), on="step", how="left", validate="one_to_one")
    row = identity | {
        "folder": str(folder),
        "cause": run.cause,
        "weight_decay": _number(optimizer.get("weight_decay")),
        "tau": _number(optimizer.get("tau")),
        "context": _number(run.config["model"].get("context")),
        **_summary(run, steps),
    }
    return (
        pd.DataFrame([row]),
        _labelled(steps, identity),
        _labelled(run.max_logits, identity),
        _labelled(run.events, identity),
    )


def _over_heads(heads: pd.DataFrame) -> pd.DataFrame:
    """One row a step: the largest logit, the smallest gamma and the mean entropy of all layers and heads."""
    by_step = heads.groupby("step")
    columns = {
        "max_logit": by_step["value"].max(),
        "gamma": by_step["gamma"].min(),
        "entropy": by_step["entropy"].mean(),
    }
    return pd.DataFrame(columns).reset_index()


def _summary(run: Run, steps: pd.DataFrame) -> dict[str, Any]:
    finished = run.status == "finished"
    initial = float(steps["train_loss"].iloc[0]) if len(steps) else math.nan
    val_loss, probe_loss, val_bits_per_byte = (
        _number(run.metrics.get(name, last_reading(steps, name))) if finished else math.nan
        for name in ("val_loss", "probe_loss", "val_bits_per_byte")
    )
    scaled = run.max_logits["gamma"].dropna()
    return {
        "num_steps": len(steps),
        "warmup_steps": warmup_steps(steps),
        "tokens": last_reading(steps, "tokens"),
        "flops": last_reading(steps, "flops"),
        "seconds": last_reading(steps, "seconds"),
        "initial_loss": initial,
        "val_loss": val_loss,
        "probe_loss": probe_loss,
        "val_bits_per_byte": val_bits_per_byte,
        "loss": settled_loss(val_loss, initial, run.status),
        "max_logit": steps["max_logit"].max(skipna=True),
        "end_max_logit": at_end(steps, "max_logit"),
        "end_entropy": at_end(steps, "entropy"),
        "clipped_share": float((scaled < 1).mean()) if len(scaled) else 0.0,
    }


def settled_loss(val_loss: float, initial_loss: float, status: str) -> float:
    """The loss that a run counts with: min(val_loss, initial_loss), and initial_loss where it diverged.

    So a diverged seed stays in every mean and rank at the price of having learnt nothing, as in the
    learning-rate sensitivity of Wortsman et al. (arXiv 2309.14322, section 2). NaN for runs that were cut
    short for other reasons.
    """
    if status == "diverged":
        return initial_loss
    return (
        min(val_loss, initial_loss)
        if math.isfinite(val_loss)
        else (initial_loss if math.isinf(val_loss) else math.nan)
    )


def warmup_steps(steps: pd.DataFrame) -> float:
    """Steps before the learning rate first reaches its largest value; NaN where it was not recorded."""
    if "lr" not in steps or not steps["lr"].notna().any():
        return math.nan
    return float(steps.loc[steps["lr"].idxmax(), "step"])


def last_reading(steps: pd.DataFrame, column: str) -> float:
    """The last recorded value of a column that need not be recorded every step; NaN where there is none."""
    readings = steps[column].dropna() if column in steps else ()
    return float(readings.iloc[-1]) if len(readings) else math.nan


def at_end(steps: pd.DataFrame, column: str) -> float:
    """Median of the readings in the last 5 % of the steps (at least the last step); NaN where there are
    none."""
    tail = steps[column].tail(max(1, round(END_SHARE * len(steps)))).dropna()
    return float(tail.median()) if len(tail) else last_reading(steps, column)


def downsample(steps: pd.DataFrame, points: int = 400) -> pd.DataFrame:
    """At most `points` rows a run, each standing for a bin of consecutive steps: what `results/` keeps.

    A bin keeps its last step, its largest max_logit and grad_norm and its smallest gamma, so that peaks
    survive; the mean of losses and entropy; the last reading of all else. Runs that are short enough are
    unchanged.
    """
    largest, smallest = {"max_logit", "grad_norm"}, {"gamma"}
    averaged = {"train_loss", "probe_loss", "val_loss", "entropy"}
    rules = {
        name: "max"
        if name in largest
        else "min"
        if name in smallest
        else "mean"
        if name in averaged
        else "last"
        for name in steps.columns
    }
    parts = []
    for _, run in steps.groupby("run", sort=False):
        width = math.ceil(len(run) / points)
        parts.append(run if width == 1 else run.groupby(np.arange(len(run)) // width).agg(rules))
    return pd.concat(parts, ignore_index=True)


def _labelled(table: pd.DataFrame, identity: dict[str, Any]) -> pd.DataFrame:
    # A step's own `lr` (the schedule's) must not hide the run's: the recorded one becomes `scheduled_lr`.
    table = table.rename(columns={"lr": "scheduled_lr"})
    labels = pd.DataFrame({name: [identity[name]] * len(table) for name in IDENTITY}, index=table.index)
    return pd.concat([labels, table], axis=1)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
