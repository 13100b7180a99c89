"""What a measure is, how a claim names one, and the runs of one seed that it is taken of."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.frames import METRICS, Frames
from muonlab.errors import MuonlabError, unknown_name

KINDS = ("run", "sweep", "pair")


@dataclass(frozen=True)
class Part:
    """The runs of one arm and one seed: rows of `Frames.runs` and of `Frames.steps`, one level or several."""

    runs: pd.DataFrame
    steps: pd.DataFrame

    @cached_property
    def levels(self) -> list["Part"]:
        """One part a level, the lowest first. The level of a run whose condition varies nothing is its peak learning
        rate. Raises MuonlabError where a level has several runs."""
        levels = level_of(self.runs)
        if levels.duplicated().any():
            raise MuonlabError(f"several runs have the level {levels[levels.duplicated()].iloc[0]}")
        traces = dict(list(self.steps.groupby(["condition", "run"], sort=False)))
        order = levels.sort_values().index if pd.api.types.is_numeric_dtype(levels) else levels.index
        return [
            Part(self.runs.loc[[i]], traces[tuple(self.runs.loc[i, ["condition", "run"]])]) for i in order
        ]

    @property
    def level(self) -> Any:
        """The level of the only run."""
        return level_of(self.only).iloc[0]

    @property
    def only(self) -> pd.DataFrame:
        """The row of the only run. Raises MuonlabError where there are several: a claim must then choose a level."""
        if len(self.runs) != 1:
            found = ", ".join(str(level) for level in level_of(self.runs))
            raise MuonlabError(
                f"a measure of one run was given {len(self.runs)}; choose one of the levels {found}"
            )
        return self.runs

    def trace(self, column: str, over: str = "max") -> pd.Series:
        """The readings of a column of the only run, by step. `svd_entropy/*` takes all columns that match, and over
        them at each step the `max`, `mean`, `median` or `min`. Raises MuonlabError for a column without readings."""
        _ = self.only
        steps = self.steps.set_index("step")
        several = column.endswith("*")
        names = [n for n in steps.columns if (n.startswith(column[:-1]) if several else n == column)]
        if not names:
            raise unknown_name("recorded column", column, steps.columns)
        readings = (
            steps[names].dropna(how="all").agg(over, axis="columns") if several else steps[column].dropna()
        )
        if readings.empty:
            raise MuonlabError(f"{column} was never recorded in {self.runs['run'].iloc[0]}")
        return readings


@dataclass(frozen=True)
class Measure:
    """A registered measure.

    kind: "run" takes the `Part` of one run, "sweep" a Series of values by level, "pair" the parts of arm and baseline.
    unit: of the result; "x": a factor, of which the logarithm is averaged; "of": that of the values of a sweep. source:
    who defined it. picks: it looks for the best level, so it says nothing about fresh seeds. limit: for a measure
    that is infinite where something was not reached, the value that it had at least.
    """

    name: str
    kind: str
    function: Callable[..., float]
    unit: str
    source: str
    picks: bool = False
    limit: Callable[..., float] | None = None


MEASURES: dict[str, Measure] = {}


def measure(kind: str, unit: str, source: str, **details: Any) -> Callable[[Callable], Callable]:
    """Register the function below under its name."""

    def register(function: Callable[..., float]) -> Callable[..., float]:
        MEASURES[function.__name__] = Measure(function.__name__, kind, function, unit, source, **details)
        return function

    return register


def level_of(runs: pd.DataFrame) -> pd.Series:
    """The level of each run, as numbers where all are numbers; its learning rate where its condition varies nothing."""
    levels = runs["level"] if "level" in runs else pd.Series(math.nan, index=runs.index)
    levels = levels.where(levels.notna(), runs["lr"])
    numbers = pd.to_numeric(levels, errors="coerce")
    return numbers if numbers.notna().all() else levels.astype(str)


def parts_by_seed(frames: Frames) -> dict[int, Part]:
    """{seed: its runs} of the frames of one arm."""
    traces = dict(list(frames.steps.groupby("seed")))
    seeds = sorted(frames.runs["seed"].unique().tolist())
    return {seed: Part(frames.runs[frames.runs["seed"] == seed], traces[seed]) for seed in seeds}


def split_measure(given: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and settings of `name` or `{name: ..., setting: ...}`."""
    if isinstance(given, str):
        return given, {}
    settings = dict(given)
    return settings.pop("name", ""), settings


def check_measure(given: str | Mapping[str, Any], kinds: tuple[str, ...] = KINDS) -> None:
    """Raises MuonlabError, naming what is near, for a measure or a setting that is not there."""
    name, settings = split_measure(given)
    if name in METRICS and "run" in kinds and not settings:
        return
    known = {n: m for n, m in MEASURES.items() if m.kind in kinds}
    if name not in known:
        raise unknown_name("measure", name, [*known, *(METRICS if "run" in kinds else ())])
    parameters = list(inspect.signature(known[name].function).parameters.values())
    own = {p.name: p for p in parameters[2 if known[name].kind == "pair" else 1 :]}
    inner = settings.pop("of", None) if known[name].kind == "sweep" else None
    if inner is not None:
        check_measure(inner, ("run",))
    for key in settings:
        if key not in own:
            raise unknown_name(
                f"setting of measure {name}", key, [*own, *(["of"] if kinds != ("run",) else [])]
            )
    for key, parameter in own.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise MuonlabError(f"measure {name} needs '{key}'")


def measured(given: str | Mapping[str, Any], part: Part) -> tuple[float, float]:
    """The value of a run or sweep measure, and the value used in calculations: the limit where it is infinite because
    its target was never reached, else the same.

    A name that is no measure is a column of `Frames.runs`. A sweep takes `of`, a run measure (default `loss`), at every
    level; levels that never reached what they are asked for stay infinite there.
    """
    name, settings = split_measure(given)
    if name not in MEASURES:
        value = float(part.only[name].iloc[0])
        return value, value
    found = MEASURES[name]
    if found.kind == "run":
        value = float(found.function(part, **settings))
        bound = found.limit(part, **settings) if math.isinf(value) and found.limit else value
        return value, float(bound)
    of = settings.pop("of", "loss")
    values = pd.Series({level.level: measured(of, level)[0] for level in part.levels}, dtype=float)
    value = float(found.function(values, **settings))
    return value, value


def unit_of(given: str | Mapping[str, Any]) -> str:
    """The unit of a measure's values, empty for a pure number and for columns that have none written down."""
    name, settings = split_measure(given)
    if name not in MEASURES:
        return METRICS.get(name, "")
    unit = MEASURES[name].unit
    return unit_of(settings.get("of", "loss")) if unit == "of" else unit
