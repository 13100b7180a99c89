"""Why a logit grows: the part of the norms of query and key, and that of the angle between them."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.canvas import Look, styled
from analysis.figures.traces import median_trace, set_steps_axis
from muonlab.errors import MuonlabError

PARTS = {
    "argmax_query_norm": ("query norm", "#0072b2", ""),
    "argmax_key_norm": ("key norm", "#7fb8d8", ""),
    "argmax_cosine": ("cosine", "#e69f00", "////"),
}


@styled
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
        rates = rows.set_index("step")["scheduled_lr"]
        peak = rates.index[int(rates.argmax())] if rates.notna().any() else 0
        readings = rows.set_index("step")[column].dropna().astype(float).clip(lower=1e-30).map(math.log10)
        readings = readings[readings.index >= peak]
        traces[run] = readings - readings.iloc[0]
    return median_trace(pd.DataFrame(traces))
