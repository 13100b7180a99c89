"""Max logit over steps."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.canvas import styled
from analysis.figures.labels import axis_label
from analysis.figures.traces import draw_traces, set_log_axis, set_steps_axis


@styled
def plot_max_logit(
    ax: Axes,
    frame: pd.DataFrame,
    tau: float | None = None,
    window: int = 1,
    title: str = "",
) -> None:
    """Largest attention logit of all layers and heads over steps, log axis, with a labelled line at `tau`.

    frame: `Frames.steps`. Readings at or below zero cannot be drawn on the log axis and are left out; they
    occur in the first steps only. tau: the clip threshold of the arms that have one; None draws no line. A
    method's excursions above the line are those of the step's forward, before its clip.
    """
    positive = frame.assign(max_logit=frame["max_logit"].where(frame["max_logit"] > 0))
    draw_traces(ax, positive, "max_logit", window)
    ax.set_yscale("log")
    finite = positive["max_logit"].replace(np.inf, np.nan).dropna()
    low, high = float(finite.quantile(0.005) / 1.2), float(finite.max() * 1.3)
    if tau is not None:
        high = max(high, 1.5 * tau)  # the line is there even where nothing came near it
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
