"""Loss, max logit, gradient norm and the clip's activity, over steps or over 1 / (learning rate x decay)."""

import numpy as np
import pandas as pd

from analysis.drawing.layout import (
    BOLD,
    TRACE_COLUMNS,
    clock_by_arm,
    columns_of,
    legend_above,
    line_per_level,
    small_multiples,
)
from analysis.drawing.lines import centred_mean
from analysis.drawing.panels import plot_column, plot_loss, plot_max_logit
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames

CLOCK_NOTE = "An arm without decay is drawn on the slowest clock of the others."


@figure("rise_and_fall")
def draw_rise_and_fall(
    frames: Frames,
    title: str = "",
    tau: float | None = None,
    window: int = 25,
    x: str = "",
    clock: bool = False,
) -> Drawing:
    """Loss, max logit, gradient norm and, where a clip ran, its activity, over steps or over 1 / (lr x decay)."""
    frames = line_per_level(frames, x)
    steps = frames.steps.assign(clipped=_clipping_share(frames.steps, window))
    if clock:
        steps["clock"] = steps["arm"].map(clock_by_arm(frames.runs))
    columns = ["probe_loss", "max_logit", "grad_norm"]
    columns += ["clipped"] if (steps["gamma"] < 1).any() else []
    fig, axes = small_multiples(len(columns), 1.9, columns=2 if len(columns) == 4 else 3)
    for ax, column in zip(axes, columns, strict=True):
        if column == "probe_loss":
            plot_loss(ax, steps, title=title or "Held-out loss")
        elif column == "max_logit":
            plot_max_logit(ax, steps, tau, title="Largest attention logit")
        elif column == "grad_norm":
            plot_column(ax, steps, column, window, title="Gradient norm")
        else:
            plot_column(ax, steps, column, title="Steps that clip")
    legend_above(fig, axes[:1])
    smooth = "Gradient norm and share of clipping steps" if "clipped" in columns else "Gradient norm"
    note = f"{smooth}: centred mean of {window} steps. {CLOCK_NOTE if clock else ''} {BOLD}"
    return (
        fig,
        columns_of(steps, [*TRACE_COLUMNS, "clock", "probe_loss", "max_logit", "grad_norm", "gamma"]),
        note,
    )


def _clipping_share(steps: pd.DataFrame, window: int) -> pd.Series:
    """For each row the share of the `window` steps around it, of the same run, in which a head was clipped."""
    share = pd.Series(np.nan, index=steps.index)
    for _, run in steps[steps["gamma"].notna()].groupby(["arm", "run"], sort=False):
        clips = pd.Series((run["gamma"] < 1).to_numpy(float), index=run["step"])
        share[run.index] = centred_mean(clips, window).to_numpy()
    return share
