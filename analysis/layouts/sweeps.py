"""Whole figures over what was varied: levels, learning-rate sensitivity, scaling, extrapolation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.canvas import PAGE, new_figure, panel_place
from analysis.figures import plot_extrapolation, plot_levels, plot_polynomials, plot_scaling, plot_sensitivity
from analysis.figures.levels import draw_reference
from analysis.frames import METRICS, Frames
from analysis.layouts.drawing import (
    Drawing,
    kept,
    legend_above,
    only_outer_labels,
    share_near_limits,
    small_multiples,
    with_conditions,
)
from analysis.measures import Part, check_measure, measured
from analysis.measures.registry import split_measure
from analysis.measures.sweeps import lr_sensitivity
from muonlab.errors import MuonlabError

SETTING = ["run", "condition", "arm", "level", "seed", "status", "lr", "weight_decay", "tau"]
FEW = "Line through medians; points are seeds (n up to 3), bars the 95% interval of their mean (n above 3)."


def draw_levels(
    frames: Frames,
    metrics: Sequence[str | Mapping[str, Any]] = ("loss",),
    x: str | Mapping[str, str] = "level",
    log: bool = True,
    cut: bool = False,
    best: bool = False,
    references: Mapping[str, Mapping[str, float]] | None = None,
    title: str = "",
) -> Drawing:
    """A row of panels a condition that varies something, a panel a metric; of one metric, all panels in a row.

    metrics: columns of `Frames.runs`, or measures of one run as claims name them ({name: end, column: sigma_max/mlp}).
    x: what the level is, the same or by condition; log, cut, best: see `plot_levels`. references: {metric: {name:
    value}}, horizontal lines. Conditions that vary nothing are horizontal lines in every panel.
    """
    frames = with_conditions(frames)
    runs, names = _measured(frames, metrics)
    varied = runs.groupby("condition")["level"].nunique() > 1
    conditions = [condition for condition in dict.fromkeys(runs["condition"]) if varied[condition]]
    if not conditions:
        raise MuonlabError("no condition of this figure varies a level: there is nothing to put on the axis")
    flat = _told_apart(runs[~runs["condition"].isin(conditions)], runs[runs["condition"].isin(conditions)])
    panels = [(condition, name) for condition in conditions for name in names]
    one = len(panels) == 1
    fig, axes = small_multiples(len(panels), 2.3 if one else 2.1, len(names) if len(names) > 1 else None)
    for ax, (condition, name) in zip(axes, panels, strict=True):
        chosen = pd.concat([_fixed(runs[runs["condition"] == condition]), flat], ignore_index=True)
        several = len(conditions) > 1 and panel_place(ax).is_first_col() | (len(names) == 1)
        heading = (
            condition.replace("_", " ")
            if several
            else title
            if len(conditions) == 1 and ax is axes[0]
            else ""
        )
        label = x if isinstance(x, str) else x.get(condition, "level")
        plot_levels(ax, chosen, name, label, log, cut, heading, best=best, name_best=one)
        for text, value in (references or {}).get(name, {}).items():
            draw_reference(ax, value, text)
    for name in names if len(conditions) > 1 else ():
        share_near_limits([ax for ax, (_, drawn) in zip(axes, panels, strict=True) if drawn == name])
    if title and len(conditions) > 1:
        fig.suptitle(title)
    legend_above(fig, axes)
    note = " Runs worse than the dotted line lie on it." if cut else ""
    return fig, kept(runs, [*SETTING, *names]), f"{FEW}{note}{' The optimum is ringed.' if best else ''}"


def draw_lr_sensitivity(frames: Frames, title: str = "", x: str = "peak learning rate") -> Drawing:
    """Validation loss over learning rate, a panel a size, and beside them how sensitive each arm is at each size.

    Conditions whose arms have one learning rate each share one panel, and have no sensitivity.
    """
    frames = with_conditions(frames)
    runs = frames.runs.assign(level=frames.runs["lr"])
    rates = runs.groupby(["condition", "arm"])["level"].nunique()
    table = kept(runs, [*SETTING, "val_loss", "loss", "max_logit"])
    if rates.max() == 1 or runs["condition"].nunique() == 1:
        fig, axes = new_figure(1, 1, height=2.3)
        plot_levels(axes[0, 0], runs, "val_loss", x, cut=True, title=title)
        legend_above(fig, list(axes.flat))
        return fig, table, f"{FEW} The optimum is ringed."
    sizes = list(dict.fromkeys(runs["condition"]))
    fig, panels = small_multiples(len(sizes) + 1, 2.4, columns=min(3, len(sizes) + 1))
    for ax, size in zip(panels, sizes, strict=False):
        plot_levels(
            ax,
            runs[runs["condition"] == size],
            "val_loss",
            x,
            cut=True,
            title=size,
            name_best=False,
        )
    share_near_limits(panels[:-1])
    only_outer_labels(panels[:-1])
    plot_sensitivity(panels[-1], sensitivities(runs), title="Sensitivity")
    if title:
        fig.suptitle(title)
    legend_above(fig, panels[-1:])
    said = (
        "Sensitivity: mean over the rates of min(loss, initial loss) minus the lowest; diverged: the initial."
    )
    return fig, table, f"{FEW} {said}"


def draw_scaling(
    frames: Frames, arm: str = "muon", baseline: str = "adamw", metric: str = "loss", title: str = ""
) -> Drawing:
    """Loss over compute with power laws, their bootstrap bands and the saving."""
    fig, axes = new_figure(1, 1, height=2.6)
    plot_scaling(axes[0, 0], frames.runs, arm, baseline, metric, title)
    legend_above(fig, list(axes.flat))
    note = (
        "Power laws through the means over seeds; bands and brackets hold 95% of the laws of resampled seeds."
    )
    return fig, kept(frames.runs, [*SETTING, "flops", metric]), note


def draw_extrapolation(
    frames: Frames, metric: str = "end_max_logit", x: str = "width", degree: int = 2, title: str = ""
) -> Drawing:
    """A metric over sizes with the fit to all but the largest, which is held out."""
    fig, axes = new_figure(1, 1, height=2.4)
    plot_extrapolation(axes[0, 0], frames.runs, metric, x, degree, title)
    legend_above(fig, list(axes.flat))
    note = f"Shaded: the held-out size; ring: its prediction by a polynomial of degree {degree} in the logarithms."
    return fig, kept(frames.runs, [*SETTING, metric]), note


def draw_polynomials(table: pd.DataFrame, title: str = "") -> Drawing:
    """Newton-Schulz schedules over all singular values (panel "whole") and over small ones ("small")."""
    fig, axes = new_figure(1, 2, width=PAGE, height=2.5)
    plot_polynomials(axes[0, 0], table[table["panel"] == "whole"])
    plot_polynomials(axes[0, 1], table[table["panel"] == "small"], log=True)
    axes[0, 0].set_title(title or "All singular values")
    axes[0, 1].set_title("Small singular values")
    legend_above(fig, list(axes.flat))
    return fig, table, "Shaded: Jordan's accepted band, 0.7 to 1.3."


def sensitivities(runs: pd.DataFrame) -> pd.DataFrame:
    """condition, arm, seed, sensitivity (nats) of every arm that was run at several learning rates."""
    rows = []
    for (condition, arm, seed), chosen in runs.groupby(["condition", "arm", "seed"], sort=False):
        losses = chosen.dropna(subset=["loss"]).set_index("lr")["loss"].sort_index()
        if losses.index.nunique() > 1:
            rows.append(
                {"condition": condition, "arm": arm, "seed": seed, "sensitivity": lr_sensitivity(losses)}
            )
    return pd.DataFrame(rows)


def _measured(frames: Frames, metrics: Sequence[str | Mapping[str, Any]]) -> tuple[pd.DataFrame, list[str]]:
    """The runs with a column for every metric that is a measure, and the columns' names."""
    runs, names = frames.runs.copy(), []
    for metric in metrics:
        name, settings = split_measure(metric)
        if name in METRICS:
            names.append(name)
            continue
        check_measure(metric, ("run",))
        column = f"{settings['column']} ({name})" if "column" in settings else name
        traces = dict(list(frames.steps.groupby(["condition", "arm", "run"], sort=False)))
        parts = [
            Part(runs.loc[[i]], traces[tuple(runs.loc[i, ["condition", "arm", "run"]])]) for i in runs.index
        ]
        runs[column] = [measured(metric, part)[0] for part in parts]
        names.append(column)
    return runs, names


def _told_apart(flat: pd.DataFrame, swept: pd.DataFrame) -> pd.DataFrame:
    """The runs that vary nothing, without level; an arm that elsewhere varies something gets its condition's name."""
    also = flat["arm"].isin(swept["arm"])
    named = flat["arm"] + " " + flat["condition"].str.replace("_", " ")
    return flat.assign(level=np.nan, arm=flat["arm"].where(~also, named))


def _fixed(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of arms with one level only lose it: they are horizontal lines in a panel where others vary."""
    levels = runs.groupby("arm")["level"].transform("nunique")
    return runs.assign(level=runs["level"].where(levels > 1))
