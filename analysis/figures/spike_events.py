"""Where spikes appear: spike scores by what was varied (rows) and definition (columns), a panel per arm."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm

from analysis.drawing.canvas import Look
from analysis.drawing.layout import RUN_COLUMNS, columns_of, small_multiples, with_conditions
from analysis.drawing.palette import styles
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames
from muonlab.errors import MuonlabError

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


SCORES = [
    *("olmo2_upward/train_loss", "olmo2_upward/grad_norm", "olmo2/grad_norm"),
    *("six_sigma/train_loss", "rolling_2x/train_loss", "zclip/grad_norm"),
]


@figure("spike_events")
def draw_spike_events(frames: Frames, scores: list[str] | None = None, title: str = "") -> Drawing:
    """Spike scores by knob (rows) and definition (columns), a panel per arm."""
    frames = with_conditions(frames)
    runs = frames.runs
    columns = [f"{PREFIX}{name}" for name in scores or SCORES if f"{PREFIX}{name}" in runs]
    if not columns:
        raise MuonlabError(
            "these runs have no spike scores; they were kept by an older version, judge them again"
        )
    knobs, arms = list(dict.fromkeys(runs["condition"])), styles(runs["arm"])
    top = float(runs.groupby(["condition", "arm"])[columns].mean().max().max())
    fig, axes = small_multiples(len(arms), 1.25 + 0.17 * len(knobs), sharey=True)
    for place, (ax, (arm, style)) in enumerate(zip(axes, arms.items(), strict=True)):
        plot_spike_events(ax, runs[runs["arm"] == arm], knobs, columns, top, title=style.label)
        if place:
            ax.tick_params(labelleft=False)
    if title:
        fig.suptitle(title)
    note = "Percent of the steps that spike by each definition (OLMo 2: 7 sigma), mean over seeds; †: a seed diverged."
    return fig, columns_of(runs, [*RUN_COLUMNS, *columns]), note


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
