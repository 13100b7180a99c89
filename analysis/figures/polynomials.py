"""Newton-Schulz schedules as functions of one singular value."""

import pandas as pd
from matplotlib.axes import Axes

from analysis.drawing.canvas import PAGE, new_figure
from analysis.drawing.layout import legend_above
from analysis.drawing.palette import Style
from analysis.figures.registry import Drawing, figure

# Schedules are not optimizers, so they have colours of their own; Muon's default schedule has Muon's colour and line.
SCHEDULES = {
    "baseline": Style("untuned (2, -1.5, 0.5)", "#4d4d4d", (0, (1.2, 1.2)), ""),
    "jordan": Style("Jordan", "#d55e00", "-", ""),
    "you": Style("You", "#e69f00", (0, (6, 1.4)), ""),
    "polar_express_1.02": Style("Polar Express", "#0072b2", (0, (4, 1.1, 1, 1.1)), ""),
    "cans": Style("CANS", "#56b4e9", (0, (3, 1.2)), ""),
    "cubic": Style("cubic", "#8a8a8a", (0, (2.2, 1.1)), ""),
    "deepseek": Style("DeepSeek", "#7b3294", (0, (3, 1, 1, 1, 1, 1)), ""),
}


UNKNOWN = Style("", "#000000", (0, (1, 1)), "")


@figure("polynomials")
def draw_polynomials(table: pd.DataFrame, title: str = "") -> Drawing:
    """Newton-Schulz schedules over all singular values (panel "whole") and over small ones ("small")."""
    fig, axes = new_figure(1, 2, width=PAGE, height=2.5)
    plot_polynomials(axes[0, 0], table[table["panel"] == "whole"])
    plot_polynomials(axes[0, 1], table[table["panel"] == "small"], log=True)
    axes[0, 0].set_title(title or "All singular values")
    axes[0, 1].set_title("Small singular values")
    legend_above(fig, list(axes.flat))
    return fig, table, "Shaded: Jordan's accepted band, 0.7 to 1.3."


def plot_polynomials(ax: Axes, frame: pd.DataFrame, log: bool = False) -> None:
    """Image of a singular value under each schedule, with a dotted line at 1 and Jordan's accepted band shaded.

    frame: schedule, steps, x in (0, 1], y. log: a logarithmic x axis, which shows where small singular values are lost.
    """
    ax.axhspan(0.7, 1.3, color="#f3ead9", lw=0, zorder=0.5)
    ax.axhline(1, color="#8c8c8c", lw=0.6, ls=(0, (1, 2)), zorder=1)
    for _, curve in frame.groupby("schedule", sort=False):
        name = str(curve["schedule"].iloc[0])
        style = SCHEDULES.get(name, UNKNOWN)
        label = f"{style.label or name.replace('_', ' ')} ({curve['steps'].iloc[0]} steps)"
        ax.plot(curve["x"], curve["y"], color=style.colour, ls=style.dash, lw=1.0, label=label)
    ax.set_xlabel("singular value / norm")
    ax.set_ylabel("image after all steps")
    if log:
        ax.set_xscale("log")
    ax.set_xlim(frame["x"].min() if log else 0, frame["x"].max())
    ax.set_ylim(0, 1.4)
