"""What whole figures share: a line per level, small multiples, shared axes, a legend above the panels."""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.drawing.canvas import COLUMN, PAGE, new_figure, panel_place
from analysis.drawing.level_axis import level_text
from analysis.frames import Frames, level_of, rows_of

BOLD = "Thin: seeds; bold: their median, in up to 120 bins."
FEW = "Line through medians; points are seeds (n up to 3), bars the 95% interval of their mean (n above 3)."
TRACE_COLUMNS = ["run", "condition", "arm", "level", "seed", "status", "step", "tokens"]
RUN_COLUMNS = ["run", "condition", "arm", "level", "seed", "status", "lr"]
SETTING = [*RUN_COLUMNS, "weight_decay", "tau"]


def columns_of(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Those of `columns` that the table has: the frames of a search have no conditions."""
    return table[[name for name in dict.fromkeys(columns) if name in table]]


def with_conditions(frames: Frames) -> Frames:
    """The frames, under one nameless condition where they have none."""
    if "condition" in frames.runs:
        return frames
    named = {name: table.assign(condition="", level=math.nan) for name, table in frames.tables.items()}
    return Frames(**named, readings=frames.readings)


def line_per_level(frames: Frames, x: str = "") -> Frames:
    """Arms that a condition runs at several levels become one arm per level: "muon weight decay 0.125", with `x` the
    level's name; arms of several conditions are distinguished by the condition's name. Others keep their names."""
    frames = with_conditions(frames)
    runs = frames.runs
    levels = level_of(runs)
    several = levels.groupby([runs["condition"], runs["arm"]]).transform("nunique") > 1
    elsewhere = runs.groupby("arm")["condition"].transform("nunique") > 1
    names = {}
    for run in rows_of(runs.assign(several=several, elsewhere=elsewhere, at=levels)):
        words = [run.arm]
        words += [f"{x} {level_text(run.at)}".strip()] if run.several else []
        words += [run.condition.replace("_", " ")] if run.elsewhere else []
        names[run.condition, run.arm, run.run] = " ".join(words)
    order = {name: rank for rank, name in enumerate(dict.fromkeys(names.values()))}

    def renamed(table: pd.DataFrame) -> pd.DataFrame:
        if table.empty:
            return table
        keys = zip(table["condition"], table["arm"], table["run"], strict=True)
        table = table.assign(arm=[names[key] for key in keys])
        return table.sort_values("arm", key=lambda arm: arm.map(order), kind="stable", ignore_index=True)

    return replace(frames, runs=renamed(runs), steps=renamed(frames.steps), heads=renamed(frames.heads))


def small_multiples(
    count: int, height: float = 2.1, columns: int | None = None, **panels
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, one column wide for one panel and a page wide for more; its axes, row by row.

    height: inches of a row. columns: panels per row; None chooses four for four, seven and eight, else at most three.
    """
    columns = columns or {1: 1, 2: 2, 4: 4, 7: 4, 8: 4}.get(count, 3)
    rows = math.ceil(count / columns)
    fig, axes = new_figure(rows, columns, PAGE if columns > 1 else COLUMN, height * rows, **panels)
    flat = list(axes.flat)
    for ax in flat[count:]:
        ax.remove()
    return fig, flat[:count]


def legend_above(fig: Figure, axes: Iterable[Axes]) -> None:
    """One legend of all the panels' lines above them, where it covers no data, in as many columns as fit."""
    handles: dict[str, Artist] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if not handles:
        return
    width, height = fig.get_size_inches()
    columns = next(
        n for n in range(len(handles), 0, -1) if n == 1 or _legend_width(list(handles), n) <= width
    )
    rows = math.ceil(len(handles) / columns)
    # Matplotlib fills a legend column by column; read it row by row.
    by_column = zip_longest(*(list(handles)[row * columns : (row + 1) * columns] for row in range(rows)))
    labels = [label for column in by_column for label in column if label is not None]
    fig.set_size_inches(width, height + 0.04 + 0.135 * rows)
    fig.legend([handles[label] for label in labels], labels, loc="outside upper left", ncols=columns)


def _legend_width(labels: list[str], columns: int) -> float:
    """The width in inches of a legend in `columns` columns, read row by row, with lines of half an inch and 6.5 pt."""
    longest = [max(map(len, labels[column::columns])) for column in range(columns)]
    return sum(0.55 + 0.052 * letters for letters in longest) + 0.1


def only_outer_labels(axes: Iterable[Axes]) -> None:
    """Keep the vertical axis' label and texts in the first column only, for panels that share it."""
    for ax in axes:
        if not panel_place(ax).is_first_col():
            ax.set_ylabel("")


def share_limits(axes: list[Axes]) -> None:
    """The same vertical limits for all panels, wide enough for each."""
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)


def share_near_limits(axes: list[Axes]) -> None:
    """Share the vertical limits where that at most doubles the narrowest, so that each panel stays readable."""
    limits = np.array([ax.get_ylim() for ax in axes])
    if limits[:, 1].max() - limits[:, 0].min() < 2 * (limits[:, 1] - limits[:, 0]).min():
        share_limits(axes)


def clock_by_arm(runs: pd.DataFrame) -> pd.Series:
    """Learning rate x weight decay of each arm, by name; the smallest of any arm for those without decay."""
    product = (runs["lr"] * runs["weight_decay"]).groupby(runs["arm"]).first()
    positive = product[product > 0]
    return product.where(product > 0, positive.min() if len(positive) else np.nan)
