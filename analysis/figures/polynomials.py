"""Newton-Schulz schedules as functions of one singular value."""

import pandas as pd
from matplotlib.axes import Axes

from analysis.canvas import styled
from analysis.palette import ARMS

LABELS = {
    "baseline": "untuned (2, -1.5, 0.5)",
    "you": "You",
    "cans": "CANS",
    "cubic": "cubic",
    "deepseek": "DeepSeek",
    "jordan": "Jordan",
}


@styled
def plot_polynomials(ax: Axes, frame: pd.DataFrame, log: bool = False) -> None:
    """Image of a singular value under each schedule, with a dotted line at 1 and Jordan's accepted band shaded.

    frame: schedule, steps, x in (0, 1], y. log: a logarithmic x axis, which shows where small singular values are lost.
    """
    ax.axhspan(0.7, 1.3, color="#f3ead9", lw=0, zorder=0.5)
    ax.axhline(1, color="#8c8c8c", lw=0.6, ls=(0, (1, 2)), zorder=1)
    styles = list(ARMS.values())
    for style, (name, curve) in zip(styles, frame.groupby("schedule", sort=False), strict=False):
        label = f"{LABELS.get(name, name.replace('_', ' ').title())} ({curve['steps'].iloc[0]} steps)"
        ax.plot(curve["x"], curve["y"], color=style.colour, ls=style.dash, lw=1.0, label=label)
    ax.set_xlabel("singular value / norm")
    ax.set_ylabel("image after all steps")
    if log:
        ax.set_xscale("log")
    ax.set_xlim(frame["x"].min() if log else 0, frame["x"].max())
    ax.set_ylim(0, 1.4)
    ax.legend(loc="lower right")
