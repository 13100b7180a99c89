"""Spike against stable: loss, max logit and gradient norm of the same seeds under two or more arms."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.drawing.canvas import PAGE, new_figure
from analysis.drawing.layout import BOLD, TRACE_COLUMNS, columns_of, legend_above, line_per_level
from analysis.drawing.lines import draw_lines, hide_steps_labels, set_log_axis, set_steps_axis
from analysis.drawing.palette import styles
from analysis.drawing.panels import plot_loss, plot_max_logit
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames

RUGS = {"loss_spikes": "loss", "grad_spikes": "gradient norm"}


@figure("spike_vs_stable")
def draw_spike_vs_stable(
    frames: Frames, title: str = "", tau: float | None = None, window: int = 25, x: str = ""
) -> Drawing:
    """Training loss, max logit and gradient norm under one another, spikes marked."""
    steps = line_per_level(frames, x).steps
    fig, axes = new_figure(3, 1, width=PAGE, height=5.2, sharex=True)
    plot_spike_vs_stable(list(axes[:, 0]), steps, tau, window=window, title=title)
    legend_above(fig, axes[:1, 0])
    note = f"Loss and gradient norm: centred mean of {window} steps over the raw trace, spikes of the raw one. {BOLD}"
    calm = [name for column, name in RUGS.items() if not steps[column].gt(0).any()]
    note += f" No 7-sigma spike of the {' or the '.join(calm)}." if calm else ""
    columns = ["train_loss", "max_logit", "grad_norm", "loss_spikes", "grad_spikes"]
    return fig, columns_of(steps, [*TRACE_COLUMNS, *columns]), note


def plot_spike_vs_stable(
    axes: Sequence[Axes],
    frame: pd.DataFrame,
    tau: float | None = None,
    window: int = 25,
    title: str = "",
) -> None:
    """Loss, max logit and gradient norm on one steps axis, with a rug of spikes below the first and the last.

    axes: three axes, top to bottom. frame: `Frames.steps`; loss_spikes and grad_spikes give the rugs, a tick
    per spike, a row per arm. window: centred mean of the two noisy traces, in steps.
    """
    top, middle, bottom = axes
    plot_loss(top, frame, "train_loss", window, title=title)
    plot_max_logit(middle, frame, tau)
    draw_lines(bottom, frame, "grad_norm", window)
    positive = frame.loc[np.isfinite(frame["grad_norm"]) & (frame["grad_norm"] > 0), "grad_norm"]
    low, high = positive.quantile(0.002) / 1.2, positive.max() * 1.2
    bottom.set_yscale("log")
    bottom.set_ylim(low, high)
    set_log_axis(bottom.yaxis, low, high)
    bottom.set_ylabel("gradient norm")
    set_steps_axis(bottom, frame)
    for ax in (top, middle):
        hide_steps_labels(ax)
    draw_rug(top, frame, "loss_spikes")
    draw_rug(bottom, frame, "grad_spikes")


def draw_rug(ax: Axes, frame: pd.DataFrame, column: str) -> None:
    """A strip below the traces, unless there is no spike: how many each arm had, and ticks where they began."""
    if not frame[column].gt(0).any():
        return
    arms = styles(frame["arm"])
    # Heights are shares of the panel: the words, then a row per arm.
    words, row = 0.1, 0.065
    strip = words + row * len(arms)
    scale = ax.yaxis.get_transform()
    low, high = scale.transform(ax.get_ylim())
    height = (high - low) / (1 - strip)

    def at(share: float) -> float:
        """The value of the axis, linear or logarithmic, at that share of the panel's height."""
        return float(scale.inverted().transform(high - (1 - share) * height))

    ax.set_ylim(at(0), at(1))
    # Ticks outside the traces' range would label the strip.
    for minor in (False, True):
        ax.set_yticks(
            [tick for tick in ax.get_yticks(minor=minor) if at(strip) <= tick <= at(1)], minor=minor
        )
    counts = []
    for rank, (arm, style) in enumerate(arms.items()):
        spikes = frame[(frame["arm"] == arm) & (frame[column] > 0)]
        place = np.full(len(spikes), at(row * (len(arms) - rank - 0.45)))
        ax.plot(spikes["step"], place, "|", color=style.colour, ms=3.5, mew=0.9, gid=f"rug {arm}")
        counts.append(f"{style.label} {int(spikes[column].sum())}")
    ax.annotate(
        "7-sigma spikes: " + ", ".join(counts),
        (0.998, at(strip)),
        xycoords=("axes fraction", "data"),
        xytext=(0, -1),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=6,
        color="#4d4d4d",
    )
