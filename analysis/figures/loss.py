"""Loss over steps."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.canvas import styled
from analysis.figures.labels import axis_label
from analysis.figures.traces import draw_traces, set_steps_axis


@styled
def plot_loss(
    ax: Axes,
    frame: pd.DataFrame,
    column: str = "probe_loss",
    window: int = 1,
    title: str = "",
) -> None:
    """Loss over optimizer steps by arm: thin lines are seeds, bold the median, a cross marks a diverged run.

    frame: `Frames.steps`. column: train_loss, probe_loss or val_loss. window: centred mean in steps for
    noisy losses (say it in the caption); 1 draws raw. The axis is cut to what the runs look like after the
    first tenth, where the arms differ, and little above the loss that they began with.
    """
    draw_traces(ax, frame, column, window)
    settled = frame.loc[frame["step"] >= 0.1 * frame["step"].max(), column]
    began = frame.loc[frame["step"] == frame["step"].min(), column].max()
    settled = settled[np.isfinite(settled)].clip(upper=1.05 * began if np.isfinite(began) else None)
    if len(settled) and settled.max() > settled.min():
        span = settled.max() - settled.min()
        ax.set_ylim(settled.min() - 0.06 * span, settled.max() + 0.06 * span)
    ax.set_ylabel(axis_label(column))
    set_steps_axis(ax, frame)
    ax.set_title(title)
