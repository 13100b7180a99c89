"""Tidy tables of many runs, which everything else in `analysis` reads."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import pandas as pd

from analysis.columns import RECORDED, SUMMARIES, Heads, RunTables
from analysis.readings import Readings
from muonlab.errors import MuonlabError
from muonlab.record import Run, load_run
from muonlab.record.columns import HEADS

# Columns of the run that every row of `steps`, `heads` and `events` repeats, so that a figure needs only one table.
IDENTITY = ["run", "arm", "optimizer", "lr", "seed", "status"]
# Columns of `steps` that count the spikes (OLMo 2's 7 sigma) that begin there, and the series that spikes.
SPIKES = {"loss_spikes": "train_loss", "grad_spikes": "grad_norm"}
PLACE = ["step", "layer", "head"]
HEAD_STEPS = 5000  # rows that `Frames.heads` has of one head, at most


@dataclass(frozen=True)
class Frames:
    """Four tables that share the column `run` (the folder's name).

    runs: one row per run: run, folder, arm, optimizer, lr, weight_decay, tau, seed, status, cause, context, the columns
        of `analysis.columns.SUMMARIES`, and spikes/<definition>/<column> (percent, see `muonlab.record.score_run`).
        Those of an experiment have `condition` and `level` too (None or NaN where nothing varies).
    steps: one row per step: the run's identity and its recorded columns, with those of muonlab.record.columns.HEADS
        that have a chart, reduced over all layers and heads (max_logit the largest, gamma the smallest, entropy in
        nats and one_hot the mean), NaN where nothing was recorded, and loss_spikes and grad_spikes, the number of
        spikes that begin there. `lr` is the run's (peak); the schedule's value at that step is `scheduled_lr`.
    heads: step, layer, head and the columns of HEADS with the run's identity: every step of runs of up to HEAD_STEPS
        steps. In longer ones each row covers equally many steps from `step` on, so that the table does not grow with
        them, and keeps what `HeadColumn.thinned` says: the largest value and value_abs, whether all were exact, the
        smallest gamma, the last entropy and one_hot.
    events: the spikes by every definition, with the run's identity.
    readings: what measures gave of the runs; one object for all parts of an experiment's frames.
    """

    runs: pd.DataFrame
    steps: pd.DataFrame
    heads: pd.DataFrame
    events: pd.DataFrame
    readings: Readings = field(default_factory=Readings)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The four tables by name."""
        return {"runs": self.runs, "steps": self.steps, "heads": self.heads, "events": self.events}

    def select(
        self, conditions: Iterable[str] = (), arms: Iterable[str] = (), levels: Sequence[float | str] = ()
    ) -> "Frames":
        """The runs of some conditions, arms and levels, in the order of `arms`; none given: all. Raises MuonlabError
        where nothing is left."""
        conditions, arms = list(conditions), list(arms)
        tables = {name: _selected(table, conditions, arms) for name, table in self.tables.items()}
        runs = tables["runs"]
        if runs.empty:
            raise MuonlabError(f"there is no run of condition {conditions or 'any'} and arm {arms or 'any'}")
        if levels:
            runs = runs[at_levels(level_of(runs), levels)]
            if runs.empty:
                names = ", ".join(tables["runs"]["arm"].unique())
                raise MuonlabError(f"no run of {names} has the level {', '.join(map(str, levels))}")
            keys = ["condition", "run"]
            steps = tables["steps"].merge(runs[keys].drop_duplicates(), on=keys)
            tables |= {"runs": runs, "steps": steps}
        return Frames(**tables, readings=self.readings)

    def of_seeds(self, seeds: Iterable[int]) -> "Frames":
        """The runs of some seeds; none are left where no run has one."""
        wanted = list(seeds)
        return Frames(
            **{
                name: table[table["seed"].isin(wanted)] if len(table) else table
                for name, table in self.tables.items()
            },
            readings=self.readings,
        )


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


def stack(conditions: Mapping[str, Frames]) -> Frames:
    """The frames of several conditions in one, with the column `condition` in each table."""
    named = [
        {name: table.assign(condition=condition) for name, table in frames.tables.items()}
        for condition, frames in conditions.items()
    ]
    tables = {name: pd.concat([each[name] for each in named], ignore_index=True) for name in named[0]}
    return Frames(**tables, readings=Readings())


def level_of(runs: pd.DataFrame) -> pd.Series:
    """The level of each run, as numbers where all are numbers; its learning rate where its condition varies nothing."""
    levels = runs["level"] if "level" in runs else pd.Series(math.nan, index=runs.index)
    levels = levels.where(levels.notna(), runs["lr"])
    numbers = pd.to_numeric(levels, errors="coerce")
    return numbers if numbers.notna().all() else levels.astype(str)


def at_levels(levels: pd.Series, wanted: Sequence[float | str]) -> pd.Series:
    """Which of `levels` are among the wanted: numbers by value, names by text."""
    numbers = pd.to_numeric(levels, errors="coerce")
    among = levels.astype(str).isin([str(w) for w in wanted])
    for value in wanted:
        if isinstance(value, int | float):
            among |= np.isclose(numbers, value, rtol=1e-9, atol=0)
    return among


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """The rows as named tuples, whose fields are the columns of the table."""
    return iter(table.itertuples())


def downsample(steps: pd.DataFrame, points: int) -> pd.DataFrame:
    """At most `points` rows per run, each for a bin of consecutive steps: what `results/` keeps.

    A bin keeps its last step, and of each column what `Column.thinned` says: peaks survive, losses are averaged, spikes
    are counted. Runs that are short enough are unchanged.
    """
    rules = {name: RECORDED[name].thinned if name in RECORDED else "last" for name in steps.columns}
    parts = []
    for _, run in steps.groupby([key for key in ("condition", "arm", "run") if key in steps], sort=False):
        width = math.ceil(len(run) / points)
        parts.append(run if width == 1 else run.groupby(np.arange(len(run)) // width).agg(rules))
    return pd.concat(parts, ignore_index=True)


def _selected(table: pd.DataFrame, conditions: list[str], arms: list[str]) -> pd.DataFrame:
    if len(table) and conditions:
        table = table[table["condition"].isin(conditions)]
    if len(table) and arms:
        order = {arm: rank for rank, arm in enumerate(arms)}
        table = table[table["arm"].isin(arms)]
        table = table.sort_values("arm", key=lambda each: each.map(order), kind="stable")
    return table.reset_index(drop=True)


def _tables(run: Run, folder: Path, arm: str) -> tuple[pd.DataFrame, ...]:
    optimizer = run.setting("optimizer", "name")
    identity = {
        "run": folder.name,
        "arm": arm or optimizer,
        "optimizer": optimizer,
        "lr": _number(run.setting("optimizer", "lr")),
        "seed": int(_number(run.config["seed"])),
        "status": run.status,
    }
    heads = _over_heads(run)
    steps = run.steps.merge(heads.by_step, on="step", how="left", validate="one_to_one")
    for name, series in SPIKES.items():
        steps[name] = _spikes_begun(run.events, series, steps["step"])
    row = identity | {
        "folder": str(folder),
        "cause": run.cause,
        "weight_decay": _number(run.setting("optimizer", "weight_decay")),
        "tau": _number(run.setting("optimizer", "tau")),
        "context": _number(run.setting("model", "context")),
    }
    tables = RunTables(run, steps, heads)
    row |= {name: each.function(tables) for name, each in SUMMARIES.items()}
    row |= {f"spikes/{name}": _number(score) for name, score in run.spike_scores.items()}
    traces = (_labelled(table, identity) for table in (steps, heads.rows, run.events))
    return pd.DataFrame([row]), *traces


def _over_heads(run: Run) -> Heads:
    """Read a piece at a time: the heads are the bulk of a record."""
    width = max(1, math.ceil(len(run.steps) / HEAD_STEPS))
    by_step, rows, smallest, scaled, clipped = [], [], [], 0, 0
    for piece in run.stream("max_logits"):
        heads = piece.astype(dict.fromkeys(PLACE, "int64"))
        by_step.append(_reduced(heads))
        rows.append(heads if width == 1 else _thinned(heads, width))
        smallest.append(heads.groupby(PLACE[1:])["gamma"].min())
        scaled += int(heads["gamma"].notna().sum())
        clipped += int((heads["gamma"] < 1).sum())
    ever = pd.concat(smallest).groupby(level=PLACE[1:]).min()
    joined = pd.concat(rows, ignore_index=True)
    return Heads(
        pd.concat(by_step, ignore_index=True),
        joined if width == 1 else _thinned(joined, width),  # a piece need not end with a row
        clipped / scaled if scaled else 0.0,
        float((ever < 1).mean()) if len(ever) else 0.0,
    )


def _reduced(heads: pd.DataFrame) -> pd.DataFrame:
    """One row per step: every column of HEADS that has a chart, reduced over all layers and heads.

    The largest logit is NaN where a bound of another head is above the largest exact one.
    """
    by_step = heads.groupby("step")
    columns = {name: by_step[head.column].agg(head.reduction) for name, head in HEADS.items() if head.chart}
    largest_exact = heads["value"].where(heads["exact"]).groupby(heads["step"]).max()
    columns["max_logit"] = columns["max_logit"].where(largest_exact >= columns["max_logit"])
    return pd.DataFrame(columns).reset_index()


def _thinned(heads: pd.DataFrame, width: int) -> pd.DataFrame:
    """One row for every head and `width` steps (see Frames)."""
    rules = {head.column: head.thinned for head in HEADS.values()}
    rules = {name: rules.get(name, "last") for name in heads.columns.drop(PLACE)}
    return heads.assign(step=heads["step"] // width * width).groupby(PLACE).agg(rules).reset_index()


def _spikes_begun(events: pd.DataFrame, series: str, steps: pd.Series) -> np.ndarray:
    begun = events[(events["definition"] == "olmo2") & (events["series"] == series)]
    return steps.isin(begun["step"]).to_numpy(int)


def _labelled(table: pd.DataFrame, identity: dict[str, object]) -> pd.DataFrame:
    # A step's own `lr` (the schedule's) must not hide the run's.
    table = table.rename(columns={"lr": "scheduled_lr"})
    labels = pd.DataFrame({name: [identity[name]] * len(table) for name in IDENTITY}, index=table.index)
    return pd.concat([labels, table], axis=1)


def _number(value: object) -> float:
    return float(value) if isinstance(value, SupportsFloat | str) else math.nan
