"""Validation loss over learning rate by size, and how far a wrong learning rate costs loss."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.drawing.canvas import new_figure
from analysis.drawing.layout import (
    FEW,
    SETTING,
    columns_of,
    legend_above,
    only_outer_labels,
    share_near_limits,
    small_multiples,
    with_conditions,
)
from analysis.drawing.palette import styles
from analysis.drawing.sweep_panel import plot_levels
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames
from analysis.measures.sweeps import lr_sensitivity


@figure("lr_sensitivity")
def draw_lr_sensitivity(frames: Frames, title: str = "", x: str = "peak learning rate") -> Drawing:
    """Validation loss over learning rate, a panel per size, and beside them how sensitive each arm is at each size.

    Conditions whose arms have one learning rate each share one panel, and have no sensitivity.
    """
    frames = with_conditions(frames)
    runs = frames.runs.assign(level=frames.runs["lr"])
    rates = runs.groupby(["condition", "arm"])["level"].nunique()
    table = columns_of(runs, [*SETTING, "val_loss", "loss", "max_logit"])
    if rates.max() == 1 or runs["condition"].nunique() == 1:
        fig, axes = new_figure(1, 1, height=2.3)
        plot_levels(axes[0, 0], runs, "val_loss", x, cut=True, title=title)
        legend_above(fig, list(axes.flat))
        return fig, table, f"{FEW} The optimum is ringed."
    sizes = list(dict.fromkeys(runs["condition"]))
    fig, panels = small_multiples(len(sizes) + 1, 2.4, columns=min(3, len(sizes) + 1))
    for ax, size in zip(panels, sizes, strict=False):
        plot_levels(ax, runs[runs["condition"] == size], "val_loss", x, cut=True, title=size, name_best=False)
    share_near_limits(panels[:-1])
    only_outer_labels(panels[:-1])
    plot_sensitivity(panels[-1], sensitivities(runs), title="Sensitivity")
    if title:
        fig.suptitle(title)
    legend_above(fig, panels[-1:])
    definition = (
        "Sensitivity, a point per seed: mean over the rates of min(loss, initial loss) minus the lowest; diverged:"
        " the initial."
    )
    return fig, table, f"{FEW} {definition}"


def plot_sensitivity(ax: Axes, frame: pd.DataFrame, title: str = "") -> None:
    """Learning-rate sensitivity by condition (a size), a line through each arm's means and a point per seed.

    frame: condition, arm, seed, sensitivity (nats: mean over the rates of min(loss, initial loss) minus the lowest;
    Wortsman et al., arXiv 2309.14322, section 2). The axis is logarithmic, as in their Fig 1.
    """
    sizes = list(dict.fromkeys(frame["condition"]))
    arms = styles(frame["arm"])
    for rank, (arm, style) in enumerate(arms.items()):
        rows = frame[frame["arm"] == arm]
        places = rows["condition"].map(sizes.index) + (rank - (len(arms) - 1) / 2) * 0.07
        means = rows.groupby(places)["sensitivity"].mean()
        ax.plot(means.index, means, color=style.colour, ls=style.dash, lw=1.0, zorder=3)
        ax.plot([], [], lw=1.0, label=style.label, **style.points | {"ls": style.dash})
        ax.plot(places, rows["sensitivity"], zorder=4, gid="seeds", **style.points)
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


def sensitivities(runs: pd.DataFrame) -> pd.DataFrame:
    """condition, arm, seed, sensitivity (nats) of every arm that was run at several learning rates."""
    rows = []
    for (condition, arm, seed), chosen in runs.groupby(["condition", "arm", "seed"], sort=False):
        losses = chosen.dropna(subset=["loss"]).set_index("lr")["loss"].sort_index()
        if losses.index.nunique() > 1:
            rows.append(
                {"condition": condition, "arm": arm, "seed": seed, "sensitivity": lr_sensitivity(losses)}
            )
    return pd.DataFrame(rows)
