"""Validation loss over learning rate."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.canvas import styled
from analysis.figures.traces import mark_divergence, set_log_axis
from analysis.palette import Style, styles
from muonlab.errors import MuonlabError


@styled
def plot_lr_sensitivity(ax: Axes, frame: pd.DataFrame, title: str = "") -> None:
    """Validation loss over learning rate by arm: a point a run, a line through the medians, the optimum
    ringed.

    frame: `Frames.runs` (run, arm, lr, status, val_loss). The line joins the medians over the runs of each
    rate, in which a run that diverged is the worst. The axis is cut at a dotted ceiling so that the basin
    is not flattened: runs worse than that lie on the ceiling as points, diverged runs as crosses, and the
    legend, which stands above it, counts the latter. An optimum at either end of the rates tried is marked
    "edge" there, since a better one may lie beyond. Raises MuonlabError where no run finished.
    """
    judged = frame[(frame["status"] == "diverged") | frame["val_loss"].notna()]
    finished = judged.loc[(judged["status"] != "diverged") & np.isfinite(judged["val_loss"]), "val_loss"]
    if finished.empty:
        raise MuonlabError(
            "there is no loss to draw over the learning rate: no run finished with a finite loss"
        )
    low = finished.min()
    ceiling = low + 1.3 * max(0.02, finished.quantile(0.75) - low)
    arms = styles(judged["arm"])
    for rank, (arm, style) in enumerate(arms.items()):
        # Crosses of several arms at one rate stand side by side.
        dodge = 1.12 ** (rank - (len(arms) - 1) / 2)
        _draw_arm(ax, judged[judged["arm"] == arm], ceiling, style, dodge)
    _draw_ceiling(ax, low, ceiling, len(arms), cut=len(finished) < len(judged) or finished.max() > ceiling)
    rates = judged["lr"]
    ax.set_xscale("log")
    ax.set_xlim(rates.min() / 1.25, rates.max() * 1.25)
    set_log_axis(ax.xaxis, rates.min(), rates.max())
    ax.set_xlabel("peak learning rate")
    ax.set_ylabel("validation loss (nats per token)")
    ax.set_title(title)
    ax.legend(loc="upper left")


def _draw_arm(ax: Axes, runs: pd.DataFrame, ceiling: float, style: Style, dodge: float) -> None:
    diverged = runs["status"] == "diverged"
    losses = runs["val_loss"].mask(diverged, np.inf)
    medians = losses.groupby(runs["lr"]).median()
    drawn = {"color": style.colour, "marker": style.marker, "mec": "white"}
    ax.plot(medians.index, medians.clip(upper=ceiling), color=style.colour, ls=style.dash, lw=1.0, zorder=3)
    ax.plot(runs["lr"][~diverged], losses[~diverged].clip(upper=ceiling), ls="none", zorder=4, **drawn)
    label = style.label
    if np.isfinite(medians).any():
        best = medians.idxmin()
        ring = {"mfc": "none", "mec": style.colour, "mew": 0.9, "ms": 8, "gid": "optimum"}
        ax.plot([best], [medians[best]], "o", zorder=5, **ring)
        edge = ", edge" if len(medians) > 1 and best in (medians.index.min(), medians.index.max()) else ""
        label += f": {medians[best]:.3f} at {best:.2g}{edge}"
    if diverged.any():
        mark_divergence(ax, dodge * runs["lr"][diverged], np.full(diverged.sum(), ceiling), style)
        label += f" ({diverged.sum()} of {len(runs)} diverged)"
    ax.plot([], [], ls=style.dash, lw=1.0, label=label, **drawn)


def _draw_ceiling(ax: Axes, low: float, ceiling: float, rows: int, cut: bool) -> None:
    """Room for `rows` of legend above the ceiling, and a dotted line there where it cuts runs off."""
    span = ceiling - low
    ax.set_ylim(low - 0.08 * span, ceiling + (0.17 + 0.09 * rows) * span)
    ax.set_yticks([tick for tick in ax.get_yticks() if low - 0.08 * span <= tick < ceiling])
    if not cut:
        return
    ax.axhline(ceiling, color="#8c8c8c", lw=0.6, ls=(0, (1, 2)), zorder=1, gid="ceiling")
    words = {"ha": "right", "va": "bottom", "fontsize": 6, "color": "#4d4d4d"}
    place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 4), "textcoords": "offset points"}
    ax.annotate("diverged, or worse than this", (1, ceiling), **place, **words)
