"""Any recorded columns over steps: one panel a column, as for the spectra of each role or the experts' balance."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.canvas import styled
from analysis.figures.labels import axis_label, is_logarithmic
from analysis.figures.traces import draw_traces, set_log_axis, set_steps_axis
from muonlab.errors import unknown_name


def expand_columns(frame: pd.DataFrame, wanted: Iterable[str]) -> list[str]:
    """The recorded columns of the frame that `wanted` names, with all of a family for "svd_entropy/*".

    Raises MuonlabError, naming what is near, where a name fits no column that holds a reading.
    """
    columns: list[str] = frame.columns.tolist()
    found: list[str] = []
    for name in wanted:
        fits = [c for c in columns if c == name or (name.endswith("*") and c.startswith(name[:-1]))]
        fits = [c for c in fits if frame[c].notna().any()]
        if not fits:
            raise unknown_name("recorded column", name, [c for c in columns if "/" in c])
        found += [c for c in fits if c not in found]
    return found


@styled
def plot_column(ax: Axes, frame: pd.DataFrame, column: str, window: int = 1, title: str = "") -> None:
    """One column over steps by arm; a logarithmic axis for those that span decades.

    frame: `Frames.steps`. window: centred mean in steps over the raw trace; 1 draws raw.
    """
    values = frame[column]
    if log := is_logarithmic(column):
        values = values.where(values > 0)
    draw_traces(ax, frame.assign(**{column: values}), column, window)
    finite = values[np.isfinite(values)]
    if log:
        low, high = finite.quantile(0.005) / 1.2, finite.max() * 1.2
        ax.set_yscale("log")
        set_log_axis(ax.yaxis, low, high)
    else:
        span = (finite.max() - finite.min()) or abs(finite.max()) or 1
        low, high = finite.min() - 0.06 * span, finite.max() + 0.06 * span
    ax.set_ylim(low, high)
    ax.set_ylabel(axis_label(column))
    set_steps_axis(ax, frame)
    ax.set_title(title)
