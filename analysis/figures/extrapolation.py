"""Can the max logit of the next size be predicted from the sizes before?"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.columns import axis_label
from analysis.drawing.canvas import Look, new_figure
from analysis.drawing.layout import SETTING, columns_of, legend_above
from analysis.drawing.level_axis import level_axis
from analysis.drawing.lines import set_log_axis
from analysis.drawing.palette import styles
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames
from muonlab.errors import MuonlabError


@figure("extrapolation")
def draw_extrapolation(
    frames: Frames, metric: str = "end_max_logit", x: str = "width", degree: int = 2, title: str = ""
) -> Drawing:
    """A metric over sizes with the fit to all but the largest, which is held out."""
    fig, axes = new_figure(1, 1, height=2.4)
    plot_extrapolation(axes[0, 0], frames.runs, metric, x, degree, title)
    legend_above(fig, list(axes.flat))
    note = f"Shaded: the held-out size; ring: its prediction by a polynomial of degree {degree} in the logarithms."
    return fig, columns_of(frames.runs, [*SETTING, metric]), note


def plot_extrapolation(
    ax: Axes,
    frame: pd.DataFrame,
    metric: str = "end_max_logit",
    x: str = "width",
    degree: int = 2,
    title: str = "",
) -> None:
    """`metric` over size by arm on two logarithmic axes, with the fit to all sizes but the largest.

    frame: `Frames.runs` (arm, level, seed and `metric`). A marker is a run, a line the polynomial of `degree` through
    the geometric means of the known sizes, dotted beyond them (Wortsman et al., arXiv 2309.14322, Fig 9); the ring is
    its prediction for the held-out size, and the legend says by which factor the measured mean there differs. Raises
    MuonlabError for fewer known sizes than the fit has coefficients.
    """
    axis = level_axis(frame["level"])
    for arm, style in styles(frame["arm"]).items():
        rows = frame[(frame["arm"] == arm) & (frame[metric] > 0) & np.isfinite(frame[metric])]
        places = axis.place(rows["level"])
        means = np.log10(rows[metric]).groupby(places).mean()
        if len(means) < degree + 2:
            raise MuonlabError(
                f"a fit of degree {degree} needs {degree + 2} sizes, and '{arm}' has {len(means)}"
            )
        earlier, last = means.iloc[:-1], means.index[-1]
        fit = np.polynomial.Polynomial.fit(earlier.index, earlier, degree)
        inside, beyond = (
            np.linspace(earlier.index[0], earlier.index[-1], 50),
            np.linspace(earlier.index[-1], last, 20),
        )
        factor = 10 ** (means.iloc[-1] - fit(last))
        look: Look = {"color": style.colour, "lw": 1.1, "zorder": 3}
        ax.plot(
            inside,
            10 ** fit(inside),
            ls=style.dash,
            label=f"{style.label}: measured {factor:.2f} x predicted",
            **look,
        )
        ax.plot(beyond, 10 ** fit(beyond), ls=(0, (1, 1.2)), gid="prediction", **look)
        ring: Look = {
            "mfc": "none",
            "mec": style.colour,
            "mew": 1.0,
            "ms": 8,
            "zorder": 5,
            "gid": "predicted",
        }
        ax.plot([last], [10 ** fit(last)], "o", **ring)
        ax.plot(places, rows[metric], zorder=4, gid="runs", **style.points)
    ax.set_yscale("log")
    low, high = frame.loc[frame[metric] > 0, metric].min() / 1.4, frame[metric].max() * 1.4
    predicted = [np.asarray(line.get_ydata(), float) for line in ax.lines if line.get_gid() == "prediction"]
    ends = np.concatenate(predicted)
    low, high = min([low, *(0.9 * v for v in ends)]), max([high, *(1.1 * v for v in ends)])
    ax.set_ylim(low, high)
    set_log_axis(ax.yaxis, low, high)
    axis.draw(ax, x)
    held_from = (sorted(axis.places.values())[-2] + max(axis.places.values())) / 2
    ax.axvspan(held_from, ax.get_xlim()[1], color="#f3ead9", lw=0, zorder=0.5, gid="held out")
    ax.set_ylabel(axis_label(metric))
    ax.set_title(title)
