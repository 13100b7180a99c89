"""Tidy tables of many runs, which everything else in `analysis` reads."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from muonlab.errors import MuonlabError
from muonlab.record import Run, load_run
from muonlab.record.spikes import SCORED

# What every row of `steps`, `heads` and `events` repeats of its run, so that a figure needs one table only.
IDENTITY = ["run", "arm", "optimizer", "lr", "seed", "status"]
# Columns of `steps` that count the spikes (OLMo 2's 7 sigma) that begin there, and the series that spikes.
SPIKES = {"loss_spikes": "train_loss", "grad_spikes": "grad_norm"}
# The columns of `runs` that a claim can be about, with their units.
METRICS = dict.fromkeys(("num_steps", "warmup_steps"), "steps") | {
    "tokens": "tokens",
    "flops": "FLOPs",
    "seconds": "s",
}
METRICS |= dict.fromkeys(("initial_loss", "val_loss", "probe_loss", "loss", "end_entropy"), "nats")
METRICS |= {"val_bits_per_byte": "bits per byte", "max_logit": "", "end_max_logit": "", "spike_score": "%"}
METRICS |= {"clipped_share": "", "clipped_heads": ""}
METRICS |= {f"spikes/{name}/{column}": "%" for name, columns in SCORED.items() for column in columns}
METRICS |= {f"spikes/olmo2_upward/{column}": "%" for column in SCORED["olmo2"]}
PLACE = ["step", "layer", "head"]
HEAD_STEPS = 5000  # rows that `Frames.heads` has of one head, at most
END_SHARE = 0.05  # "at the end" is the median over this last share of a run's steps


@dataclass(frozen=True)
class Frames:
    """Four tables that share the column `run` (the folder's name).

    runs: one row a run: run, folder, arm, optimizer, lr, weight_decay, tau, seed, status, cause, num_steps,
        warmup_steps, context, tokens, flops, seconds, initial_loss, val_loss, probe_loss, val_bits_per_byte
        (the last readings of a finished run; NaN for one that diverged or was cut short), loss
        (`settled_loss`), max_logit (largest of all steps and heads), end_max_logit, end_entropy (nats),
        spike_score (OLMo 2's, upward only, of the training loss, percent), clipped_share (share of the
        (step, head) pairs that the clip scaled down), clipped_heads (share of the heads that it ever scaled),
        spikes/<definition>/<column> (percent, see `muonlab.record.score_run`).
    steps: one row a step: the run's identity and its recorded columns, with max_logit (largest of all heads),
        gamma (smallest of all heads) and entropy (mean of all heads, nats) of that step, NaN where nothing
        was recorded, and loss_spikes and grad_spikes, the number of spikes that begin there. `lr` is the
        run's (peak); the schedule's value at that step is `scheduled_lr`.
    heads: step, layer, head, value, value_abs, exact, gamma, entropy and one_hot with the run's identity: every step
        of runs of up to HEAD_STEPS steps. Of longer ones each row stands for equally many steps from `step` on, so
        that the table does not grow with them: the largest value and value_abs, whether all were exact, the smallest
        gamma, the last entropy and one_hot.
    events: the spikes by every definition, with the run's identity.
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
    groups = folders if isinstance(folders, Mapping) else {"": folders}
    labelled = [(arm, Path(folder)) for arm, group in groups.items() for folder in group]
    if not labelled:
        raise MuonlabError("no run folder was given, so there is nothing to analyse")
    tables = [_tables(load_run(folder), folder, arm) for arm, folder in labelled]
    return Frames(*(pd.concat(parts, ignore_index=True) for parts in zip(*tables, strict=True)))


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """The rows as named tuples, whose columns only the table knows."""
    return iter(table.itertuples())


def settled_loss(val_loss: float, initial_loss: float, status: str) -> float:
    """The loss that a run counts with: min(val_loss, initial_loss), and initial_loss where it diverged or was too
    large for its machine's memory.

    So a diverged seed stays in every mean and rank at the price of having learnt nothing, as in the
    learning-rate sensitivity of Wortsman et al. (arXiv 2309.14322, section 2). NaN for runs that were cut
    short for other reasons.
    """
    if status in ("diverged", "out-of-memory") or val_loss == math.inf:
        return initial_loss
    return math.nan if math.isnan(val_loss) else min(val_loss, initial_loss)


def warmup_steps(steps: pd.DataFrame) -> float:
    """Steps before the learning rate first has its largest value; NaN where it was not recorded."""
    if not steps["lr"].notna().any():
        return math.nan
    return float(steps["step"].to_numpy()[steps["lr"].argmax()])


def last_reading(steps: pd.DataFrame, column: str) -> float:
    """The last recorded value of a column that need not be recorded every step; NaN where there is none."""
    readings = steps[column].dropna().tolist() if column in steps else []
    return float(readings[-1]) if readings else math.nan


def at_end(steps: pd.DataFrame, column: str) -> float:
    """Median of the readings in the last 5 % of the steps, or the last reading where those have none."""
    tail = steps[column].tail(max(1, round(END_SHARE * len(steps)))).dropna()
    return float(tail.median()) if len(tail) else last_reading(steps, column)


def downsample(steps: pd.DataFrame, points: int = 400) -> pd.DataFrame:
    """At most `points` rows a run, each standing for a bin of consecutive steps: what `results/` keeps.

    A bin keeps its last step, its largest max_logit and grad_norm and its smallest gamma, so that peaks
    survive; the mean of losses and entropy; the number of spikes; the last reading of all else. Runs that are
    short enough are unchanged.
    """
    kept = {"max_logit": "max", "grad_norm": "max", "gamma": "min", **dict.fromkeys(SPIKES, "sum")}
    kept |= dict.fromkeys(("train_loss", "probe_loss", "val_loss", "entropy"), "mean")
    rules = {name: kept.get(name, "last") for name in steps.columns}
    parts = []
    for _, run in steps.groupby([key for key in ("condition", "arm", "run") if key in steps], sort=False):
        width = math.ceil(len(run) / points)
        parts.append(run if width == 1 else run.groupby(np.arange(len(run)) // width).agg(rules))
    return pd.concat(parts, ignore_index=True)


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
    heads = _over_heads(run)
    steps = run.steps.merge(heads.by_step, on="step", how="left", validate="one_to_one")
    for name, series in SPIKES.items():
        steps[name] = _spikes_begun(run.events, series, steps["step"])
    row = identity | {
        "folder": str(folder),
        "cause": run.cause,
        "weight_decay": _number(optimizer.get("weight_decay")),
        "tau": _number(optimizer.get("tau")),
        "context": _number(run.config["model"].get("context")),
        **_summary(run, steps),
        "clipped_share": heads.clipped_share,
        "clipped_heads": heads.clipped_heads,
    }
    traces = (_labelled(table, identity) for table in (steps, heads.kept, run.events))
    return pd.DataFrame([row]), *traces


@dataclass(frozen=True)
class _Heads:
    """What single heads give to a run's row, to its rows in `Frames.steps`, and to `Frames.heads`."""

    by_step: pd.DataFrame
    kept: pd.DataFrame
    clipped_share: float
    clipped_heads: float


def _over_heads(run: Run) -> _Heads:
    """Read a piece at a time: the heads are the bulk of a record."""
    width = max(1, math.ceil(len(run.steps) / HEAD_STEPS))
    by_step, kept, smallest, scaled, clipped = [], [], [], 0, 0
    for piece in run.stream("max_logits"):
        heads = piece.astype(dict.fromkeys(PLACE, "int64"))
        by_step.append(_reduced(heads))
        kept.append(heads if width == 1 else _thinned(heads, width))
        smallest.append(heads.groupby(PLACE[1:])["gamma"].min())
        scaled += int(heads["gamma"].notna().sum())
        clipped += int((heads["gamma"] < 1).sum())
    ever = pd.concat(smallest).groupby(level=PLACE[1:]).min()
    rows = pd.concat(kept, ignore_index=True)
    return _Heads(
        pd.concat(by_step, ignore_index=True),
        rows if width == 1 else _thinned(rows, width),  # a piece ends where it will, not with a row
        clipped / scaled if scaled else 0.0,
        float((ever < 1).mean()) if len(ever) else 0.0,
    )


def _reduced(heads: pd.DataFrame) -> pd.DataFrame:
    """One row a step: the largest logit, the smallest gamma and the mean entropy of all layers and heads.

    The largest logit is NaN where a bound of another head is above the largest exact one.
    """
    by_step = heads.groupby("step")
    largest, known = by_step["value"].max(), heads["value"].where(heads["exact"]).groupby(heads["step"]).max()
    columns = {
        "max_logit": largest.where(known >= largest),
        "gamma": by_step["gamma"].min(),
        "entropy": by_step["entropy"].mean(),
    }
    return pd.DataFrame(columns).reset_index()


def _thinned(heads: pd.DataFrame, width: int) -> pd.DataFrame:
    """One row for every head and `width` steps (see Frames)."""
    rules = {name: {"gamma": "min", "exact": "min"}.get(name, "max") for name in heads.columns.drop(PLACE)}
    rules |= dict.fromkeys(heads.columns.intersection(["entropy", "one_hot"]), "last")
    return heads.assign(step=heads["step"] // width * width).groupby(PLACE).agg(rules).reset_index()


def _spikes_begun(events: pd.DataFrame, series: str, steps: pd.Series) -> np.ndarray:
    chosen = events[(events["definition"] == "olmo2") & (events["series"] == series)]
    return steps.isin(chosen["step"]).to_numpy(int)


def _summary(run: Run, steps: pd.DataFrame) -> dict[str, Any]:
    initial = float(steps["train_loss"].iloc[0]) if len(steps) else math.nan
    final = dict.fromkeys(("val_loss", "probe_loss", "val_bits_per_byte"), math.nan)
    if run.status == "finished":
        final = {name: _number(run.metrics.get(name, last_reading(steps, name))) for name in final}
    return {
        "num_steps": len(steps),
        "warmup_steps": warmup_steps(steps),
        "tokens": last_reading(steps, "tokens"),
        "flops": last_reading(steps, "flops"),
        "seconds": last_reading(steps, "seconds"),
        "initial_loss": initial,
        **final,
        "loss": settled_loss(final["val_loss"], initial, run.status),
        "max_logit": steps["max_logit"].max(),
        "end_max_logit": at_end(steps, "max_logit"),
        "end_entropy": at_end(steps, "entropy"),
        "spike_score": _number(run.spike_scores.get("olmo2_upward/train_loss")),
        **{f"spikes/{name}": _number(score) for name, score in run.spike_scores.items()},
    }


def _labelled(table: pd.DataFrame, identity: dict[str, Any]) -> pd.DataFrame:
    # A step's own `lr` (the schedule's) must not hide the run's.
    table = table.rename(columns={"lr": "scheduled_lr"})
    labels = pd.DataFrame({name: [identity[name]] * len(table) for name in IDENTITY}, index=table.index)
    return pd.concat([labels, table], axis=1)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
