"""What a kind of figure is, how an experiment's file asks for one, and how it is drawn and saved."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd
from matplotlib.figure import Figure

from analysis.drawing.canvas import style
from analysis.drawing.save import save_figure
from analysis.frames import Frames
from muonlab.errors import MuonlabError, unknown_name
from muonlab.settings.check import Text, check

Drawing = tuple[Figure, pd.DataFrame, str]  # the figure, the table that it shows, and a note for its caption
FIGURES: dict[str, Callable[..., Drawing]] = {}
SHARED: dict[str, Any] = {
    "name": Text,
    "kind": Text,
    "about": str,
    "conditions": Sequence[str],
    "arms": Sequence[str],
    "table": Text,
}


def figure(kind: str) -> Callable[[Callable[..., Drawing]], Callable[..., Drawing]]:
    """Register the function below as a kind of figure. Its first argument is `Frames`, or the table of a figure that
    shows no runs; the others are the settings that an experiment's file may give, checked by their annotations."""

    def register(function: Callable[..., Drawing]) -> Callable[..., Drawing]:
        FIGURES[kind] = function
        return function

    return register


@dataclass(frozen=True)
class FigureSpec:
    """A figure as an experiment's file asks for it.

    name: of its files. about: the caption's first sentence. conditions, arms: which runs; none: all. table: the CSV
    file that it shows instead of runs; "": none. settings: those of its kind.
    """

    name: str
    kind: str
    about: str = ""
    conditions: Sequence[str] = ()
    arms: Sequence[str] = ()
    table: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)


def read_figure(
    values: Mapping[str, object], windows: Mapping[str, Sequence[Sequence[int]]] | None = None
) -> FigureSpec:
    """The figure in a mapping.

    windows: the steps in which the clip acts, by condition, for kinds that take them and a figure that gives none.
    Raises MuonlabError, naming what is near, for an unknown kind or setting, a missing one, and a value of a wrong
    type.
    """
    for key in ("name", "kind"):
        if key not in values:
            raise MuonlabError(f"a figure needs '{key}', not {dict(values)}")
    name, kind = str(values["name"]), str(values["kind"])
    if kind not in FIGURES:
        raise unknown_name("kind of figure", kind, FIGURES)
    parameters = dict(list(inspect.signature(FIGURES[kind]).parameters.items())[1:])
    types = SHARED | {key: hint for key, hint in get_type_hints(FIGURES[kind]).items() if key in parameters}
    for key in values:
        if key not in types:
            raise unknown_name(f"setting of figure {name} ({kind})", key, types)
    checked = {key: check(types[key], value, f"{key} of figure {name}") for key, value in values.items()}
    if "windows" in parameters and "windows" not in checked:
        switched = [windows[name] for name in checked.get("conditions", ()) if windows and name in windows]
        checked |= {"windows": switched[0]} if switched else {}
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in checked:
            raise MuonlabError(f"the figure {name} ({kind}) needs '{key}'")
    settings = {key: checked.pop(key) for key in parameters if key in checked}
    return FigureSpec(**checked, settings=settings)


def draw(spec: FigureSpec, data: Frames | pd.DataFrame, folder: Path, made_by: str) -> dict[str, Path]:
    """Draw and save one figure; the paths by file type.

    data: runs, or the table of a figure that shows none. made_by: the command and commit, the caption's last sentence.
    Raises MuonlabError where there is nothing to draw.
    """
    sample = ""
    if isinstance(data, Frames):
        data = data.select(spec.conditions, spec.arms)
        sample = describe_sample(data.runs)
    with style():
        fig, table, note = FIGURES[spec.kind](data, **spec.settings)
        caption = " ".join(f"{spec.about} {note} {sample} {made_by}".split())
        return save_figure(fig, folder, spec.name, table, caption=caption)


def describe_sample(runs: pd.DataFrame) -> str:
    """The sample, for a caption: "9 runs, n=3 seeds each; 716,800 tokens a run."."""
    setting = [c for c in ("condition", "arm", "level", "lr") if c in runs]
    seeds = runs.groupby(setting, dropna=False)["seed"].nunique()
    count = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    plural = "seed" if seeds.max() == 1 else "seeds"
    tokens = sorted({int(t) for t in runs.loc[runs["status"] != "diverged", "tokens"].dropna()})
    tokens = tokens or sorted({int(t) for t in runs["tokens"].dropna()})
    diverged = int((runs["status"] == "diverged").sum())
    lost = f", {diverged} diverged" if diverged else ""
    spent = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    return f"{len(runs)} runs, n={count} {plural} each{lost}; {spent} tokens a run."
