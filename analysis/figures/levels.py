"""A number of each run over what a sweep varied: learning rate, tau, weight decay, kappa, heads, batch size."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from analysis.drawing.canvas import panel_place
from analysis.drawing.layout import (
    FEW,
    SETTING,
    columns_of,
    legend_above,
    share_near_limits,
    small_multiples,
    with_conditions,
)
from analysis.drawing.sweep_panel import draw_reference, plot_levels
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames
from analysis.measures import read_quantity, run_parts
from muonlab.errors import MuonlabError


@figure("levels")
def draw_levels(
    frames: Frames,
    metrics: Sequence[str | Mapping[str, object]] = ("loss",),
    x: str | Mapping[str, str] = "level",
    over: Literal["level", "lr"] = "level",
    log: bool = True,
    cut: bool = False,
    best: bool = False,
    references: Mapping[str, Mapping[str, float]] | None = None,
    title: str = "",
) -> Drawing:
    """A row of panels per condition that varies something, a panel per metric; of one metric, all panels in a row.

    metrics: columns of `Frames.runs`, or measures of one run as claims name them ({name: end, column: sigma_max/mlp}).
    x: what the level is, the same or by condition. over: what is on the axis, the level or the run's peak learning
    rate. log, cut, best: see `plot_levels`. references: {metric: {name: value}}, horizontal lines. Conditions that vary
    nothing are horizontal lines in every panel.
    """
    frames = with_conditions(frames)
    runs, names = _measured(frames, metrics)
    if over == "lr":
        runs = runs.assign(level=runs["lr"])
    varied = runs.groupby("condition")["level"].nunique() > 1
    conditions = [condition for condition in dict.fromkeys(runs["condition"]) if varied[condition]]
    if not conditions:
        raise MuonlabError("no condition of this figure varies a level: there is nothing to put on the axis")
    flat = _distinguished(runs[~runs["condition"].isin(conditions)], runs[runs["condition"].isin(conditions)])
    panels = [(condition, name) for condition in conditions for name in names]
    one = len(panels) == 1
    fig, axes = small_multiples(len(panels), 2.3 if one else 2.1, len(names) if len(names) > 1 else None)
    for ax, (condition, name) in zip(axes, panels, strict=True):
        panel = pd.concat([_fixed(runs[runs["condition"] == condition]), flat], ignore_index=True)
        several = len(conditions) > 1 and panel_place(ax).is_first_col() | (len(names) == 1)
        heading = title if len(conditions) == 1 and ax is axes[0] else ""
        heading = condition.replace("_", " ") if several else heading
        label = x if isinstance(x, str) else x.get(condition, "level")
        plot_levels(ax, panel, name, label, log, cut, heading, best=best, name_best=one)
        for text, value in (references or {}).get(name, {}).items():
            draw_reference(ax, value, text)
    for name in names if len(conditions) > 1 else ():
        share_near_limits([ax for ax, (_, drawn) in zip(axes, panels, strict=True) if drawn == name])
    if title and len(conditions) > 1:
        fig.suptitle(title)
    legend_above(fig, axes)
    note = " Runs worse than the dotted line lie on it." if cut else ""
    return (
        fig,
        columns_of(runs, [*SETTING, *names]),
        f"{FEW}{note}{' The optimum is ringed.' if best else ''}",
    )


def _measured(
    frames: Frames, metrics: Sequence[str | Mapping[str, object]]
) -> tuple[pd.DataFrame, list[str]]:
    """The runs with a column for every metric that is a measure, and the columns' names."""
    runs, names = frames.runs.copy(), []
    parts = run_parts(frames, rough=True)
    for metric in metrics:
        quantity = read_quantity(metric, ("run",))
        name, column = quantity.name, quantity.settings.get("column")
        if name not in runs:
            name = f"{column} ({name})" if column else name
            runs[name] = [quantity.value(part)[0] for part in parts]
        names.append(name)
    return runs, names


def _distinguished(flat: pd.DataFrame, swept: pd.DataFrame) -> pd.DataFrame:
    """The runs that vary nothing, without level; an arm that elsewhere varies something gets its condition's name."""
    also = flat["arm"].isin(swept["arm"])
    named = flat["arm"] + " " + flat["condition"].str.replace("_", " ")
    return flat.assign(level=np.nan, arm=flat["arm"].where(~also, named))


def _fixed(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of arms with one level only lose it: they are horizontal lines in a panel where others vary."""
    levels = runs.groupby("arm")["level"].transform("nunique")
    return runs.assign(level=runs["level"].where(levels > 1))
