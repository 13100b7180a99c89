"""Why a logit grows: the part of the norms of query and key, and that of the angle between them."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.columns import peak_step
from analysis.drawing.canvas import Look
from analysis.drawing.layout import (
    TRACE_COLUMNS,
    columns_of,
    legend_above,
    line_per_level,
    only_outer_labels,
    share_limits,
    small_multiples,
)
from analysis.drawing.lines import median_trace, set_steps_axis
from analysis.drawing.palette import styles
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames
from muonlab.errors import MuonlabError

PARTS = {
    "argmax_query_norm": ("query norm", "#0072b2", ""),
    "argmax_key_norm": ("key norm", "#7fb8d8", ""),
    "argmax_cosine": ("cosine", "#e69f00", "////"),
}


@figure("mechanism")
def draw_mechanism(frames: Frames, title: str = "", x: str = "") -> Drawing:
    """The growth of the largest logit in parts, a panel per arm."""
    steps = line_per_level(frames, x).steps
    arms = styles(steps["arm"])
    fig, axes = small_multiples(len(arms), 2.1)
    for ax, (arm, style) in zip(axes, arms.items(), strict=True):
        plot_mechanism(ax, steps[steps["arm"] == arm], title=style.label)
    share_limits(axes)
    only_outer_labels(axes)
    if title:
        fig.suptitle(title)
    legend_above(fig, axes[:1])
    parts = ["probe_max_logit", "argmax_query_norm", "argmax_key_norm", "argmax_cosine"]
    table = columns_of(steps, [*TRACE_COLUMNS, *parts]).dropna(subset=parts, how="all")
    return fig, table, "Medians over seeds; log10 of the largest logit is the sum of the parts."


def plot_mechanism(ax: Axes, frame: pd.DataFrame, title: str = "") -> None:
    """Growth of the largest logit of the probe batch, split into three stacked parts, medians over seeds.

    frame: `Frames.steps` of one arm, with the columns PARTS, `scheduled_lr` and step. With S = |q| |k| cos(q, k) /
    sqrt(d) at the largest logit, log10 S grows by the sum of what log10 of the norms and the cosine grow (Wortsman et
    al., arXiv 2309.14322, App. E.1). The growth is counted from the first reading after warm-up; parts that shrink lie
    below zero, and the black line is the sum. Raises MuonlabError where the parts were not recorded.
    """
    if missing := [name for name in PARTS if name not in frame or frame[name].isna().all()]:
        raise MuonlabError(f"{', '.join(missing)} was never recorded; set trainer.spectra_every")
    parts = {name: _growth(frame, name) for name in PARTS}
    steps = parts["argmax_cosine"].index
    above, below = np.zeros(len(steps)), np.zeros(len(steps))
    for name, (label, colour, hatch) in PARTS.items():
        values = parts[name].to_numpy()
        positive, negative = values.clip(min=0), values.clip(max=0)
        look: Look = {"facecolor": colour, "edgecolor": "white", "hatch": hatch, "lw": 0.3, "zorder": 2}
        ax.fill_between(steps, above, above + positive, label=label, **look)
        ax.fill_between(steps, below, below + negative, **look)
        above, below = above + positive, below + negative
    total = sum(part.to_numpy() for part in parts.values())
    ax.plot(steps, total, color="#000000", lw=1.2, zorder=4, label="max logit")
    ax.axhline(0, color="#4d4d4d", lw=0.7, zorder=3)
    margin = 0.06 * max(above.max() - below.min(), 0.1)
    ax.set_ylim(below.min() - margin, above.max() + margin)
    ax.set_ylabel("growth since warm-up\n(decades)")
    set_steps_axis(ax, frame)
    ax.set_title(title)


def _growth(frame: pd.DataFrame, column: str) -> pd.Series:
    """log10 of the column minus itself at the first reading after warm-up, the median over runs by step."""
    traces = {}
    for run, rows in frame.groupby("run", sort=False):
        peak = peak_step(rows["step"], rows["scheduled_lr"])
        readings = rows.set_index("step")[column].dropna().astype(float).clip(lower=1e-30).map(math.log10)
        readings = readings[~(readings.index < peak)]
        traces[run] = readings - readings.iloc[0]
    return median_trace(pd.DataFrame(traces))
