"""How far a wrong learning rate costs loss, by arm and by size."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.canvas import Look, styled
from analysis.palette import styles


@styled
def plot_sensitivity(ax: Axes, frame: pd.DataFrame, title: str = "") -> None:
    """Learning-rate sensitivity by condition (a size), a line through each arm's means and a point a seed.

    frame: condition, arm, seed, sensitivity (nats: mean over the rates of min(loss, initial loss) minus the lowest;
    Wortsman et al., arXiv 2309.14322, section 2). The axis is logarithmic, as in their Fig 1.
    """
    sizes = list(dict.fromkeys(frame["condition"]))
    arms = styles(frame["arm"])
    for rank, (arm, style) in enumerate(arms.items()):
        rows = frame[frame["arm"] == arm]
        places = rows["condition"].map(sizes.index) + (rank - (len(arms) - 1) / 2) * 0.07
        drawn: Look = {"color": style.colour, "marker": style.marker, "mec": "white"}
        means = rows.groupby(places)["sensitivity"].mean()
        ax.plot(means.index, means, color=style.colour, ls=style.dash, lw=1.0, zorder=3)
        ax.plot([], [], ls=style.dash, lw=1.0, label=style.label, **drawn)
        ax.plot(places, rows["sensitivity"], ls="none", zorder=4, gid="seeds", **drawn)
    ax.set_yscale("log")
    low, high = frame["sensitivity"].min() / 1.25, frame["sensitivity"].max() * 1.25
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set_xlim(-0.5, len(sizes) - 0.5)
    ax.set_xlabel("size")
    ax.set_ylabel("learning-rate sensitivity (nats)")
    ax.set_title(title)
