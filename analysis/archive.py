"""The tidy tables of an experiment on disk: small enough to commit, enough to redraw and to judge again."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.frames import Frames, downsample
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
POINTS, FEWEST_POINTS = 1000, 60  # rows a run: at most, and at least whatever the size
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
    """Write runs.csv and steps.parquet: every recorded scalar, in single precision.

    A run keeps at most 1,000 rows, and fewer, down to 60, where the file would pass 700 kB. Paths of this machine are
    left out; what needs every head or every step is judged before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = frames.runs.drop(columns="folder")
    runs.to_csv(folder / "runs.csv", index=False, float_format="%.9g", lineterminator="\n")
    rare = sorted(set(frames.steps.columns) - set(IDENTITY) - set(EVERY_STEP))
    columns = [name for name in [*IDENTITY, *EVERY_STEP, *rare] if name in frames.steps]
    wide = frames.steps[columns].dropna(axis="columns", how="all")
    path, points = folder / "steps.parquet", POINTS
    while points == POINTS or (path.stat().st_size > STEPS_BYTES and points > FEWEST_POINTS):
        _write_steps(downsample(wide, points), path)
        points = max(FEWEST_POINTS, points * 2 // 3)


def _write_steps(steps: pd.DataFrame, path: Path) -> None:
    floats = [c for c in steps.select_dtypes("float64").columns if c not in IDENTITY]
    steps = steps.astype(dict.fromkeys(floats, "float32"))
    if "level" in steps and steps["level"].dtype == object:
        steps["level"] = steps["level"].map(lambda value: f"{value:g}" if isinstance(value, float) else value)
    # Splitting a column's bytes by significance makes slowly changing floats compress twice as well.
    text = [c for c in steps.columns if c not in floats]
    table = pa.Table.from_pandas(steps, preserve_index=False)
    pq.write_table(table, path, compression="zstd", use_dictionary=text, use_byte_stream_split=floats)


def load_frames(folder: Path) -> Frames:
    """What `save_frames` wrote; heads and events are empty. Raises MuonlabError where it wrote nothing."""
    if not (folder / "runs.csv").exists():
        raise MuonlabError(f"no experiment in {folder}: it has no runs.csv")
    runs = pd.read_csv(folder / "runs.csv")
    steps = pd.read_parquet(folder / "steps.parquet")
    return Frames(runs, steps, pd.DataFrame(), pd.DataFrame())
