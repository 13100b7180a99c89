"""The tidy tables of an experiment on disk: small enough to commit, enough to redraw and to judge again."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from analysis.frames import Frames, downsample
from analysis.readings import Readings, as_readings
from muonlab.errors import MuonlabError
from muonlab.record.columns import HEADS

IDENTITY = ["run", "condition", "arm", "level", "optimizer", "lr", "seed", "status", "step"]
POINTS = (1000, 600, 400, 250, 150, 100, 60)  # rows per run: as many as fit
HEAD_POINTS = 200  # steps of heads.parquet
TESTS = "tests.csv.gz"  # a sentence for every test of every run, a tenth as large as written out
STEPS_BYTES = 700_000  # of steps.parquet, so that an experiment's folder stays near one megabyte


class TrainedBy(TypedDict, total=False):
    """What trained the runs of an experiment: every commit, CPU and accelerator, and how many runs had uncommitted
    changes."""

    commits: list[str]
    dirty: int
    cpu: list[str]
    accelerators: list[str]


class Made(TypedDict, total=False):
    """How the results in a folder were made, as made.json has it: the command and what judged, what trained, and the
    seeds that its looks added, by condition."""

    command: str
    commit: str | None
    dirty: bool | None
    accelerators: list[str]
    date: str
    runs: TrainedBy
    added_seeds: dict[str, list[int]]


def save_frames(frames: Frames, folder: Path) -> None:
    """Write runs.csv, events.parquet (every spike of every run by every definition), steps.parquet with every recorded
    scalar in single precision, and heads.parquet where there are heads: at most 200 rows per run and head, each with
    what `HeadColumn.thinned` keeps of its steps.

    A run keeps at most 1,000 rows, and fewer, down to 60, where the file would pass 700 kB. Paths of this machine are
    left out; tests and measures that need every head or every step are applied before, and their results are kept
    beside (tests.csv.gz, readings.csv).
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = frames.runs.drop(columns="folder")
    runs.to_csv(folder / "runs.csv", index=False, float_format="%.9g", lineterminator="\n")
    _write(frames.events, folder / "events.parquet")
    columns = [name for name in dict.fromkeys([*IDENTITY, *frames.steps.columns]) if name in frames.steps]
    wide = frames.steps[columns].dropna(axis="columns", how="all")
    for points in POINTS:
        _write(downsample(wide, points), folder / "steps.parquet")
        if (folder / "steps.parquet").stat().st_size <= STEPS_BYTES:
            break
    if len(frames.heads):
        keys = [c for c in IDENTITY if c in frames.heads and c != "step"] + ["layer", "head"]
        width = max(1, math.ceil(frames.heads["step"].max() / HEAD_POINTS))
        bins = frames.heads.groupby([*keys, frames.heads["step"] // width * width], dropna=False, sort=False)
        charted = (head for head in HEADS.values() if head.chart)
        rules = {head.column: head.thinned for head in charted if head.column in frames.heads}
        _write(bins.agg(rules).reset_index(), folder / "heads.parquet")


def save_outcomes(outcomes: pd.DataFrame, folder: Path) -> None:
    """Write TESTS, the outcomes of the tests of single runs; the same outcomes give the same bytes."""
    compression = {"method": "gzip", "compresslevel": 9, "mtime": 0}
    outcomes.to_csv(
        folder / TESTS, index=False, float_format="%.6g", lineterminator="\n", compression=compression
    )


def load_frames(folder: Path) -> Frames:
    """What `save_frames` wrote, except the events, which no figure draws; heads are empty where none were kept.

    Raises MuonlabError where it wrote nothing, and for tables that are damaged.
    """
    if not (folder / "runs.csv").exists():
        raise MuonlabError(f"no experiment in {folder}: it has no runs.csv")
    runs = read_table(folder / "runs.csv")
    steps = read_table(folder / "steps.parquet")
    path = folder / "heads.parquet"
    heads = read_table(path) if path.exists() else pd.DataFrame()
    if unknown := set(steps.get("run", ())) - set(runs.get("run", ())):
        raise MuonlabError(f"the results in {folder} are damaged: runs.csv lacks {sorted(unknown)[0]}")
    readings = Readings()
    if (path := folder / "readings.csv").exists():
        with reading(path):
            readings = as_readings(read_table(path))
    return Frames(runs, steps, heads, pd.DataFrame(), readings)


def kept_in(folder: Path) -> list[Path]:
    """The folders of the experiments kept in `folder` or below, by name. Raises MuonlabError where there is none."""
    kept = sorted(path.parent for path in folder.rglob("experiment.yaml"))
    if not kept:
        raise MuonlabError(f"no experiment is kept in {folder}; run `make ablation` to make one")
    return kept


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever reading this file raises into MuonlabError."""
    try:
        yield
    except FileNotFoundError as error:
        raise MuonlabError(f"the results in {path.parent} are damaged: they have no {path.name}") from error
    # ValueError: not UTF-8, not JSON, or not a table; KeyError: the table lacks a column.
    except (OSError, ValueError, KeyError, yaml.YAMLError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise MuonlabError(
            f"the results in {path.parent} are damaged: {path.name} cannot be read: {reason}"
        ) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises MuonlabError for a file that holds something else."""
    with reading(path):
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(content, dict):
        raise MuonlabError(f"the results in {path.parent} are damaged: {path.name} does not hold a mapping")
    return content


def read_made(folder: Path) -> Made:
    """The folder's made.json. Raises MuonlabError for a file that does not hold a mapping."""
    return cast(Made, read_mapping(folder / "made.json"))


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """The list of mappings in a JSON file. Raises MuonlabError for a file that holds something else."""
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, list) or not all(isinstance(row, Mapping) for row in content):
        raise MuonlabError(
            f"the results in {path.parent} are damaged: {path.name} does not hold a list of rows"
        )
    return content


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """The table in a CSV or Parquet file, or some of its columns. Raises MuonlabError for one that cannot be read."""
    with reading(path):
        if path.suffix == ".parquet":
            return pd.read_parquet(path, columns=columns)
        return pd.read_csv(path, usecols=columns)


def _write(steps: pd.DataFrame, path: Path) -> None:
    floats = [c for c in steps.select_dtypes("float64").columns if c not in IDENTITY]
    steps = steps.astype(dict.fromkeys(floats, "float32"))
    if "level" in steps and steps["level"].dtype == object:
        steps["level"] = steps["level"].map(lambda value: f"{value:g}" if isinstance(value, float) else value)
    # Splitting a column's bytes by significance makes slowly changing floats compress twice as well.
    text = [c for c in steps.columns if c not in floats]
    table = pa.Table.from_pandas(steps, preserve_index=False)
    pq.write_table(table, path, compression="zstd", use_dictionary=text, use_byte_stream_split=floats)
