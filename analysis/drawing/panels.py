"""Panels that several figures share: a loss, the max logit, or any recorded column over steps."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.columns import axis_label, is_logarithmic
from analysis.drawing.lines import draw_lines, set_log_axis, set_steps_axis
from muonlab.errors import unknown_name


def plot_loss(
    ax: Axes, frame: pd.DataFrame, column: str = "probe_loss", window: int = 1, title: str = ""
) -> None:
    """Loss over optimizer steps by arm: thin lines are seeds, bold the median, a cross marks a diverged run.

    frame: `Frames.steps`. column: train_loss, probe_loss or val_loss. window: centred mean in steps for noisy losses
    (mention it in the caption); 1 draws the raw trace. The axis is limited to the range of the losses after the first
    tenth, where the arms differ, and to a little above the initial loss.
    """
    draw_lines(ax, frame, column, window)
    settled = frame.loc[frame["step"] >= 0.1 * frame["step"].max(), column]
    began = frame.loc[frame["step"] == frame["step"].min(), column].max()
    settled = settled[np.isfinite(settled)].clip(upper=1.05 * began if np.isfinite(began) else None)
    if len(settled) and settled.max() > settled.min():
        span = settled.max() - settled.min()
        ax.set_ylim(settled.min() - 0.06 * span, settled.max() + 0.06 * span)
    ax.set_ylabel(axis_label(column))
    set_steps_axis(ax, frame)
    ax.set_title(title)


def plot_max_logit(ax: Axes, frame: pd.DataFrame, tau: float | None = None, title: str = "") -> None:
    """Largest attention logit of all layers and heads over steps, log axis, with a labelled line at `tau`.

    frame: `Frames.steps`. Readings at or below zero cannot be drawn on the log axis and are left out; they
    occur in the first steps only. tau: the clip threshold of the arms that have one; None draws no line. Excursions
    above the line are of the forward pass of a step, before its clip.
    """
    positive = frame.assign(max_logit=frame["max_logit"].where(frame["max_logit"] > 0))
    draw_lines(ax, positive, "max_logit")
    ax.set_yscale("log")
    finite = positive["max_logit"].replace(np.inf, np.nan).dropna()
    low, high = float(finite.quantile(0.005) / 1.2), float(finite.max() * 1.3)
    if tau is not None:
        high = max(high, 1.5 * tau)  # the line is visible even where no trace comes near it
    ax.set_ylim(low, high)
    set_log_axis(ax.yaxis, low, high)
    draw_tau(ax, tau)
    ax.set_ylabel(axis_label("max_logit"))
    set_steps_axis(ax, frame)
    ax.set_title(title)


def draw_tau(ax: Axes, tau: float | None) -> None:
    """A dashed line at the clip threshold, its value written outside the axes, where no trace is."""
    if tau is None:
        return
    ax.axhline(tau, color="#262626", lw=0.8, ls=(0, (3, 2)), zorder=2.5, gid="tau")
    ax.annotate(
        f"τ = {tau:g}",
        (1, tau),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        fontsize=6.5,
        color="#262626",
    )


def plot_column(ax: Axes, frame: pd.DataFrame, column: str, window: int = 1, title: str = "") -> None:
    """One column over steps by arm; a logarithmic axis for those that span decades.

    frame: `Frames.steps`. window: centred mean in steps over the raw trace; 1 draws the raw trace alone.
    """
    values = frame[column]
    if log := is_logarithmic(column):
        values = values.where(values > 0)
    draw_lines(ax, frame.assign(**{column: values}), column, window)
    finite = values[np.isfinite(values)]
    if log:
        low, high = finite.quantile(0.005) / 1.2, finite.max() * 1.2
        ax.set_yscale("log")
        set_log_axis(ax.yaxis, low, high)
    else:
        span = (finite.max() - finite.min()) or abs(finite.max()) or 1
        low, high = finite.min() - 0.06 * span, finite.max() + 0.06 * span
    ax.set_ylim(low, high)
    ax.set_ylabel(axis_label(column))
    set_steps_axis(ax, frame)
    ax.set_title(title)


def expand_columns(frame: pd.DataFrame, wanted: Iterable[str]) -> list[str]:
    """The recorded columns of the frame that `wanted` names, with all of a family for "svd_entropy/*".

    Raises MuonlabError, naming what is near, where a name fits no column that holds a reading.
    """
    columns: list[str] = frame.columns.tolist()
    matching: list[str] = []
    for name in wanted:
        fits = [c for c in columns if c == name or (name.endswith("*") and c.startswith(name[:-1]))]
        fits = [c for c in fits if frame[c].notna().any()]
        if not fits:
            raise unknown_name("recorded column", name, [c for c in columns if "/" in c])
        matching += [c for c in fits if c not in matching]
    return matching
