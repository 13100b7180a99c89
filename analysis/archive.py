"""The tidy tables of an experiment on disk: small enough to commit, enough to redraw and to judge again."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.frames import Frames, downsample
from analysis.kept import read_table
from muonlab.errors import MuonlabError

IDENTITY = ["run", "condition", "arm", "level", "optimizer", "lr", "seed", "status", "step"]
# Kept beside whatever was recorded at a cadence of its own, such as spectra.
EVERY_STEP = [
    "tokens",
    "flops",
    "seconds",
    "scheduled_lr",
    "train_loss",
    "probe_loss",
    "val_loss",
    "max_logit",
]
EVERY_STEP += ["gamma", "entropy", "grad_norm", "loss_spikes", "grad_spikes"]
POINTS = (1000, 600, 400, 250, 150, 100, 60)  # rows a run: as many as fit
HEAD_POINTS = 200  # steps of heads.parquet
STEPS_BYTES = 700_000  # of steps.parquet, so that an experiment's folder stays near one megabyte


def stack(conditions: Mapping[str, Frames]) -> Frames:
    """The frames of several conditions under one another, with the column `condition` in each table."""
    tables = {
        field.name: [getattr(f, field.name).assign(condition=name) for name, f in conditions.items()]
        for field in fields(Frames)
    }
    return Frames(**{name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()})


def choose(frames: Frames, conditions: Iterable[str] = (), arms: Iterable[str] = ()) -> Frames:
    """The runs of some conditions and arms, in the order of `arms`; an empty choice is every one.

    Raises MuonlabError where nothing is left.
    """
    conditions, arms = list(conditions), list(arms)
    chosen = {}
    for field in fields(Frames):
        table = getattr(frames, field.name)
        if len(table):
            if conditions:
                table = table[table["condition"].isin(conditions)]
            if arms:
                order = {arm: rank for rank, arm in enumerate(arms)}
                table = table[table["arm"].isin(arms)].sort_values(
                    "arm", key=lambda a: a.map(order), kind="stable"
                )
        chosen[field.name] = table.reset_index(drop=True)
    if chosen["runs"].empty:
        raise MuonlabError(f"no run of condition {conditions or 'any'} and arm {arms or 'any'} is there")
    return Frames(**chosen)


def save_frames(frames: Frames, folder: Path) -> None:
    """Write runs.csv, events.csv (every spike of every run by every definition), steps.parquet with every recorded
    scalar in single precision, and heads.parquet where there are heads, at most 200 rows a run and head: each the
    largest logit and the smallest gamma of its steps.

    A run keeps at most 1,000 rows, and fewer, down to 60, where the file would pass 700 kB. Paths of this machine are
    left out; what needs every head or every step is judged before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = frames.runs.drop(columns="folder")
    runs.to_csv(folder / "runs.csv", index=False, float_format="%.9g", lineterminator="\n")
    frames.events.to_csv(folder / "events.csv", index=False, float_format="%.6g", lineterminator="\n")
    rare = sorted(set(frames.steps.columns) - set(IDENTITY) - set(EVERY_STEP))
    columns = [name for name in [*IDENTITY, *EVERY_STEP, *rare] if name in frames.steps]
    wide = frames.steps[columns].dropna(axis="columns", how="all")
    for points in POINTS:
        _write(downsample(wide, points), folder / "steps.parquet")
        if (folder / "steps.parquet").stat().st_size <= STEPS_BYTES:
            break
    if len(frames.heads):
        keys = [c for c in IDENTITY if c in frames.heads and c != "step"] + ["layer", "head"]
        width = max(1, math.ceil(frames.heads["step"].max() / HEAD_POINTS))
        bins = frames.heads.groupby([*keys, frames.heads["step"] // width * width], dropna=False, sort=False)
        rules = {"value": "max", "gamma": "min", "entropy": "mean"}
        _write(bins.agg(rules).reset_index(), folder / "heads.parquet")


def _write(steps: pd.DataFrame, path: Path) -> None:
    floats = [c for c in steps.select_dtypes("float64").columns if c not in IDENTITY]
    steps = steps.astype(dict.fromkeys(floats, "float32"))
    if "level" in steps and steps["level"].dtype == object:
        steps["level"] = steps["level"].map(lambda value: f"{value:g}" if isinstance(value, float) else value)
    # Splitting a column's bytes by significance makes slowly changing floats compress twice as well.
    text = [c for c in steps.columns if c not in floats]
    table = pa.Table.from_pandas(steps, preserve_index=False)
    pq.write_table(table, path, compression="zstd", use_dictionary=text, use_byte_stream_split=floats)


def load_frames(folder: Path) -> Frames:
    """What `save_frames` wrote, but for the events, which no figure draws; heads are empty where none were kept.

    Raises MuonlabError where it wrote nothing, and for tables that are damaged.
    """
    if not (folder / "runs.csv").exists():
        raise MuonlabError(f"no experiment in {folder}: it has no runs.csv")
    runs = read_table(folder / "runs.csv")
    steps = read_table(folder / "steps.parquet")
    kept = folder / "heads.parquet"
    heads = read_table(kept) if kept.exists() else pd.DataFrame()
    if unknown := set(steps.get("run", ())) - set(runs.get("run", ())):
        raise MuonlabError(f"the results in {folder} are damaged: runs.csv lacks {sorted(unknown)[0]}")
    return Frames(runs, steps, heads, pd.DataFrame())
