"""The tidy tables of an experiment on disk: small enough to commit, enough to redraw and to judge again."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import pandas as pd

from analysis.frames import Frames, downsample
from muonlab.errors import MuonlabError

DRAWN = ["run", "condition", "arm", "optimizer", "lr", "seed", "status", "step", "tokens"]
DRAWN += [
    "train_loss",
    "probe_loss",
    "max_logit",
    "gamma",
    "entropy",
    "grad_norm",
    "loss_spikes",
    "grad_spikes",
]


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
    """Write runs.csv and steps.parquet (the columns that figures draw, at most 1,000 rows a run, single precision).

    Paths of this machine are left out; what needs every head or every step is judged before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = frames.runs.drop(columns="folder")
    runs.to_csv(folder / "runs.csv", index=False, float_format="%.9g", lineterminator="\n")
    steps = downsample(frames.steps[DRAWN], points=1000)
    wide = steps.select_dtypes("float64").columns
    steps.astype(dict.fromkeys(wide, "float32")).to_parquet(
        folder / "steps.parquet", compression="zstd", index=False
    )


def load_frames(folder: Path) -> Frames:
    """What `save_frames` wrote; heads and events are empty. Raises MuonlabError where it wrote nothing."""
    if not (folder / "runs.csv").exists():
        raise MuonlabError(f"no experiment in {folder}: it has no runs.csv")
    runs = pd.read_csv(folder / "runs.csv")
    steps = pd.read_parquet(folder / "steps.parquet")
    return Frames(runs, steps, pd.DataFrame(), pd.DataFrame())
