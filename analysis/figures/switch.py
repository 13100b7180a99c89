"""The clip switched off and on inside one run: what it does to the loss and to the max logit."""

from collections.abc import Sequence
from itertools import pairwise

import pandas as pd
from matplotlib.axes import Axes

from analysis.drawing.canvas import PAGE, new_figure
from analysis.drawing.layout import BOLD, TRACE_COLUMNS, columns_of, legend_above, line_per_level
from analysis.drawing.lines import hide_steps_labels
from analysis.drawing.panels import plot_loss, plot_max_logit
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames
from analysis.run_tests import off_windows
from muonlab.errors import MuonlabError


@figure("switch")
def draw_switch(
    frames: Frames,
    windows: Sequence[Sequence[int]] | None = None,
    title: str = "",
    tau: float | None = None,
    x: str = "",
) -> Drawing:
    """Probe loss above max logit, shaded where the clip is off: outside `windows`, by default the condition's."""
    if not windows:
        raise MuonlabError("a figure of the switch needs `windows`; set them on its condition")
    steps = line_per_level(frames, x).steps
    fig, axes = new_figure(2, 1, width=PAGE, height=3.9, sharex=True)
    plot_switch(list(axes[:, 0]), steps, windows, tau, title=title)
    legend_above(fig, axes[:1, 0])
    return (
        fig,
        columns_of(steps, [*TRACE_COLUMNS, "probe_loss", "max_logit"]),
        f"Shaded: the clip is off. {BOLD}",
    )


def plot_switch(
    axes: Sequence[Axes],
    frame: pd.DataFrame,
    windows: Sequence[Sequence[int]],
    tau: float | None = None,
    title: str = "",
) -> None:
    """Loss above, max logit below, on one steps axis, shaded where the clip is off.

    axes: two axes, top and bottom. frame: `Frames.steps`. windows: the steps in which the clip acts, first to
    last exclusive, as in the optimizer's setting `windows`.
    """
    top, bottom = axes
    plot_loss(top, frame, title=title)
    plot_max_logit(bottom, frame, tau)
    hide_steps_labels(top)
    last = int(frame["step"].max()) + 1
    for first, end in off_windows(windows, last):
        for ax in (top, bottom):
            ax.axvspan(first, end, color="#f3ead9", lw=0, zorder=0.5, gid="clip off")
    edges = sorted({0, last, *(edge for window in off_windows(windows, last) for edge in window)})
    for first, end in pairwise(edges):
        state = "off" if any(start <= first < stop for start, stop in off_windows(windows, last)) else "on"
        bottom.annotate(
            f"clip {state}",
            ((first + end) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6.5,
            color="#4d4d4d",
        )
