"""Spike against stable: loss, max logit and gradient norm of the same seeds under two or more arms."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from analysis.canvas import styled
from analysis.figures.loss import plot_loss
from analysis.figures.max_logit import plot_max_logit
from analysis.figures.traces import draw_traces, hide_steps_labels, set_log_axis, set_steps_axis
from analysis.frames import Frames
from analysis.palette import styles


@styled
def plot_spike_vs_stable(
    axes: Sequence[Axes],
    frames: Frames,
    tau: float | None = None,
    column: str = "train_loss",
    window: int = 25,
    title: str = "",
) -> None:
    """Three panels on one steps axis: loss with a rug of spike events, max logit, gradient norm.

    axes: three axes, top to bottom. frames: the runs to compare; `events` gives the rug, a tick at the bottom
    of the loss panel per event, a row an arm. column: the loss drawn. window: trailing mean of the noisy
    traces, in steps.
    """
    top, middle, bottom = axes
    steps = frames.steps
    plot_loss(top, steps, column, window, title=title)
    plot_max_logit(middle, steps, tau, legend=False)
    draw_traces(bottom, steps, "grad_norm", window)
    positive = steps["grad_norm"][np.isfinite(steps["grad_norm"]) & (steps["grad_norm"] > 0)]
    low, high = positive.quantile(0.002) / 1.2, positive.max() * 1.2
    bottom.set_yscale("log")
    bottom.set_ylim(low, high)
    set_log_axis(bottom.yaxis, low, high)
    bottom.set_ylabel("gradient norm")
    set_steps_axis(bottom, steps)
    for ax in (top, middle):
        hide_steps_labels(ax)
    _draw_rug(top, frames)


def _draw_rug(ax: Axes, frames: Frames) -> None:
    """A strip under the loss: how many spike events each arm had, and a row of ticks where they were."""
    arms = styles(frames.steps["arm"])
    low, high = ax.get_ylim()
    row = 0.05 * (high - low)
    floor = low - row * (len(arms) + 2)
    ax.set_ylim(floor, high)
    ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= high])
    counts = []
    for rank, (arm, style) in enumerate(arms.items()):
        at = frames.events.loc[frames.events["arm"] == arm, "step"]
        height = np.full(len(at), floor + row * (len(arms) - rank - 0.3))
        ax.plot(at, height, "|", color=style.colour, ms=4, mew=0.9, gid=f"rug {arm}")
        counts.append(f"{style.label} {len(at)}")
    text = "spike events: " + ", ".join(counts)
    ax.annotate(
        text,
        (0.995, low),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="top",
        fontsize=6,
        color="#4d4d4d",
    )
