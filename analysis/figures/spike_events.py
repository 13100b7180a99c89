"""Where spikes appear: a table of spike scores, a row a knob, a column a definition, a panel an optimizer."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm

from analysis.canvas import Look, styled

PREFIX = "spikes/"
DEFINITIONS = {
    "olmo2": "OLMo 2",
    "olmo2_upward": "OLMo 2, up",
    "six_sigma": "6 sigma",
    "rolling_2x": "2 x mean",
    "zclip": "ZClip",
}
SERIES = {"train_loss": "loss", "grad_norm": "grad"}
SHADES = LinearSegmentedColormap.from_list("spikes", ["#ffffff", "#f6c9a4", "#d55e00", "#7a2f00"])


@styled
def plot_spike_events(
    ax: Axes, frame: pd.DataFrame, knobs: list[str], columns: list[str], top: float, title: str = ""
) -> None:
    """Mean spike score over seeds (percent of the steps) in every cell, shaded by its square root up to `top`.

    frame: `Frames.runs` of one arm: condition, seed, status and the `columns` ("spikes/<definition>/<series>"). knobs:
    the conditions, top to bottom. A dagger marks cells with a diverged seed, whose scores end where it did; an empty
    cell was not run. White is no spike in any seed.
    """
    means = frame.groupby("condition")[columns].mean().reindex(knobs)
    lost = frame["status"].eq("diverged").groupby(frame["condition"]).any().reindex(knobs, fill_value=False)
    norm = PowerNorm(0.5, vmin=0, vmax=max(top, 1e-9))
    ax.pcolormesh(means.to_numpy(), cmap=SHADES, norm=norm, edgecolors="#d9d9d9", linewidth=0.4)
    for row, (knob, values) in enumerate(zip(knobs, means.to_numpy(float), strict=True)):
        for column, value in enumerate(values):
            if np.isnan(value):
                continue
            dark = norm(value) > 0.55
            words: Look = {
                "ha": "center",
                "va": "center",
                "fontsize": 6,
                "color": "white" if dark else "#262626",
            }
            ax.text(column + 0.5, row + 0.5, _short(value) + ("†" if lost[knob] else ""), **words)
    ax.set_ylim(len(knobs), 0)
    ax.set_yticks([row + 0.5 for row in range(len(knobs))], knobs)
    ax.set_xticks([place + 0.5 for place in range(len(columns))], [column_label(name) for name in columns])
    ax.tick_params(axis="both", length=0)
    ax.tick_params(axis="x", labelrotation=90)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set_title(title)


def column_label(column: str) -> str:
    """ "spikes/olmo2/train_loss": "OLMo 2: loss"."""
    definition, _, series = column.removeprefix(PREFIX).partition("/")
    return f"{DEFINITIONS.get(definition, definition)}: {SERIES.get(series, series)}"


def _short(score: float) -> str:
    return "<.01" if 0 < score < 0.01 else f"{score:.2g}"
