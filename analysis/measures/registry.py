"""What a measure is, how a claim names one, and the runs of one seed that it is computed from."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd

from analysis.columns import METRICS
from analysis.frames import Frames, level_of
from analysis.readings import Readings
from muonlab.errors import MuonlabError, unknown_name
from muonlab.settings.check import check

KINDS = ("run", "sweep", "pair")


@dataclass(frozen=True)
class Part:
    """The runs of one arm and one seed: rows of `Frames.runs` and of `Frames.steps`, one level or several.

    readings: what is known of them already. rough: traces with one step in several will do, as for a figure.
    """

    runs: pd.DataFrame
    steps: pd.DataFrame
    readings: Readings = field(default_factory=Readings)
    rough: bool = False

    @property
    def names(self) -> str:
        """The names of the runs, as `Readings` has them."""
        return "+".join(self.runs["run"])

    @property
    def complete(self) -> bool:
        """Whether every step of the runs is at hand, as it is before they are kept."""
        return "num_steps" not in self.runs or len(self.steps) >= self.runs["num_steps"].sum()

    @cached_property
    def levels(self) -> list["Part"]:
        """One part per level, the lowest first. The level of a run whose condition varies nothing is its peak learning
        rate. Raises MuonlabError where a level has several runs."""
        levels = level_of(self.runs)
        if levels.duplicated().any():
            raise MuonlabError(f"several runs have the level {levels[levels.duplicated()].iloc[0]}")
        traces = dict(list(self.steps.groupby(["condition", "run"], sort=False)))
        order = levels.sort_values().index if pd.api.types.is_numeric_dtype(levels) else levels.index
        return [
            replace(
                self, runs=self.runs.loc[[i]], steps=traces[tuple(self.runs.loc[i, ["condition", "run"]])]
            )
            for i in order
        ]

    @property
    def level(self) -> float | str:
        """The level of the only run."""
        return level_of(self.only).iloc[0]

    @property
    def only(self) -> pd.DataFrame:
        """The row of the only run. Raises MuonlabError where there are several: a claim must then choose a level."""
        if len(self.runs) != 1:
            levels = ", ".join(str(level) for level in level_of(self.runs))
            raise MuonlabError(
                f"a measure of one run was given {len(self.runs)}; choose one of the levels {levels}"
            )
        return self.runs

    def trace(self, column: str, over: str = "max") -> pd.Series:
        """The readings of a column of the only run, by step. `svd_entropy/*` takes all columns that match, and at each
        step their `max`, `mean`, `median` or `min`. Raises MuonlabError for a column without readings, and where only
        one step in several was kept, unless that will do."""
        name = self.only["run"].iloc[0]
        if not (self.complete or self.rough):
            steps = self.only["num_steps"].iloc[0]
            raise MuonlabError(
                f"{len(self.steps)} of {steps:.0f} steps of {name} were kept, too few to measure {column} by; "
                "the experiment's command reads all of them again"
            )
        steps = self.steps.set_index("step")
        several = column.endswith("*")
        names = [n for n in steps.columns if (n.startswith(column[:-1]) if several else n == column)]
        if not names:
            raise unknown_name("recorded column", column, steps.columns)
        readings = (
            steps[names].dropna(how="all").agg(over, axis="columns") if several else steps[column].dropna()
        )
        if readings.empty:
            raise MuonlabError(f"{column} was never recorded in {name}")
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


def measure(
    kind: str, unit: str, source: str, picks: bool = False, limit: Callable[..., float] | None = None
) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Register the function below under its name; see `Measure`."""

    def register(function: Callable[..., float]) -> Callable[..., float]:
        MEASURES[function.__name__] = Measure(function.__name__, kind, function, unit, source, picks, limit)
        return function

    return register


def parts_by_seed(frames: Frames) -> dict[int, Part]:
    """{seed: its runs} of the frames of one arm."""
    traces = dict(list(frames.steps.groupby("seed")))
    seeds = sorted(frames.runs["seed"].unique().tolist())
    return {
        seed: Part(frames.runs[frames.runs["seed"] == seed], traces[seed], frames.readings) for seed in seeds
    }


def run_parts(frames: Frames, rough: bool = False) -> list[Part]:
    """A part for each run, in the order of `Frames.runs`; `rough` as in `Part`."""
    keys = ["condition", "arm", "run"]
    traces = dict(list(frames.steps.groupby(keys, sort=False)))
    runs = frames.runs
    return [Part(runs.loc[[i]], traces[tuple(runs.loc[i, keys])], frames.readings, rough) for i in runs.index]


@dataclass(frozen=True)
class Quantity:
    """What a claim or a figure is about: a measure with its settings, or a column of `Frames.runs`.

    of: the quantity of each run that a sweep measure takes; None: `loss`.
    """

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    of: "Quantity | None" = None

    def __str__(self) -> str:
        details = [f"{key} {value}" for key, value in self.settings.items()]
        details += [f"of {self.of}"] if self.of else []
        return f"{self.name} ({', '.join(details)})" if details else self.name

    @property
    def kind(self) -> str:
        """ "run", "sweep" or "pair"; a column of `Frames.runs` is of one run."""
        return MEASURES[self.name].kind if self.name in MEASURES else "run"

    @property
    def picks(self) -> bool:
        """Whether it looks for the best level, so that it says nothing about fresh seeds."""
        return self.name in MEASURES and MEASURES[self.name].picks

    @property
    def unit(self) -> str:
        """The unit of its values; "" for a pure number, "x" for a factor."""
        if self.name not in MEASURES:
            return METRICS[self.name]
        unit = MEASURES[self.name].unit
        return (self.of or Quantity("loss")).unit if unit == "of" else unit

    def value(self, part: Part) -> tuple[float, float]:
        """The value of a run or sweep quantity, and the value used in calculations: the limit where it is infinite
        because its target was never reached, else the same. In a sweep, levels that never reached their target stay
        infinite."""
        if self.name not in MEASURES:
            value = float(part.only[self.name].iloc[0])
            return value, value
        measure = MEASURES[self.name]
        if measure.kind == "sweep":
            of = self.of or Quantity("loss")
            values = {level.level: of.value(level)[0] for level in part.levels}
            value = float(measure.function(pd.Series(values, dtype=float), **self.settings))
            return value, value

        def read() -> tuple[float, float]:
            value = float(measure.function(part, **self.settings))
            bound = measure.limit(part, **self.settings) if math.isinf(value) and measure.limit else value
            return value, float(bound)

        return part.readings.get((str(self), part.names, ""), read, anew=part.complete)

    def of_pair(self, arm: Part, baseline: Part) -> float:
        """The value of a pair quantity."""

        def read() -> tuple[float, float]:
            value = float(MEASURES[self.name].function(arm, baseline, **self.settings))
            return value, value

        anew = arm.complete and baseline.complete
        return arm.readings.get((str(self), arm.names, baseline.names), read, anew)[0]


def read_quantity(text: str | Mapping[str, object], kinds: tuple[str, ...] = KINDS) -> Quantity:
    """The quantity that a file calls `name` or `{name: ..., setting: ...}`.

    Raises MuonlabError, naming what is near, for an unknown measure or setting and for a missing one.
    """
    settings = {"name": text} if isinstance(text, str) else dict(text)
    name = str(settings.pop("name", ""))
    if name in METRICS and "run" in kinds and not settings:
        return Quantity(name)
    allowed = {n: m for n, m in MEASURES.items() if m.kind in kinds}
    if name not in allowed:
        raise unknown_name("measure", name, [*allowed, *(METRICS if "run" in kinds else ())])
    sweep = allowed[name].kind == "sweep"
    of = None
    if sweep and "of" in settings:
        inner = check(str | Mapping[str, object], settings.pop("of"), f"`of` of measure {name}")
        of = read_quantity(inner, ("run",))
    parameters = list(inspect.signature(allowed[name].function).parameters.values())
    own = {p.name: p for p in parameters[2 if allowed[name].kind == "pair" else 1 :]}
    for key in settings:
        if key not in own:
            raise unknown_name(f"setting of measure {name}", key, [*own, *(["of"] if sweep else [])])
    for key, parameter in own.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise MuonlabError(f"measure {name} needs '{key}'")
    return Quantity(name, settings, of)
