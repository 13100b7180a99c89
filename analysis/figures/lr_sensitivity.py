"""Validation loss over learning rate."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.canvas import styled
from analysis.figures.traces import set_log_axis
from analysis.palette import Style, styles
from muonlab.errors import MuonlabError


@styled
def plot_lr_sensitivity(ax: Axes, frame: pd.DataFrame, title: str = "", legend: bool = True) -> None:
    """Validation loss over learning rate by arm: a point a run, a line through the medians, the optimum
    ringed.

    frame: `Frames.runs` (run, arm, lr, status, val_loss). The line joins the medians over the runs of each
    rate, in which a run that diverged is the worst. Diverged runs are crosses on the top edge and are counted
    in the legend; runs that learnt so little that the basin would be flattened are drawn on the top edge as
    points. An optimum at either end of the rates tried is marked "edge" in the legend, since a better one may
    lie beyond. Raises MuonlabError where no run finished.
    """
    judged = frame[(frame["status"] == "diverged") | frame["val_loss"].notna()]
    finished = judged.loc[(judged["status"] != "diverged") & np.isfinite(judged["val_loss"]), "val_loss"]
    if finished.empty:
        raise MuonlabError(
            "there is no loss to draw over the learning rate: no run finished with a finite val_loss"
        )
    low = finished.min()
    top = low + 1.3 * max(0.02, finished.quantile(0.75) - low)
    for arm, style in styles(judged["arm"]).items():
        _draw_arm(ax, judged[judged["arm"] == arm], top, style)
    ax.set_ylim(low - 0.08 * (top - low), top + 0.05 * (top - low))
    ax.set_xscale("log")
    rates = judged["lr"]
    ax.set_xlim(rates.min() / 1.25, rates.max() * 1.25)
    set_log_axis(ax.xaxis, rates.min(), rates.max())
    ax.set_xlabel("peak learning rate")
    ax.set_ylabel("validation loss (nats per token)")
    ax.set_title(title)
    if legend:
        ax.legend(loc="best")


def _draw_arm(ax: Axes, runs: pd.DataFrame, top: float, style: Style) -> None:
    diverged = runs["status"] == "diverged"
    losses = runs["val_loss"].mask(diverged, np.inf).fillna(np.inf)
    medians = losses.groupby(runs["lr"]).median()
    ax.plot(medians.index, medians.clip(upper=top), color=style.colour, ls=style.dash, lw=1.0, zorder=3)
    finite = np.isfinite(losses)
    points = {"ls": "none", "color": style.colour, "clip_on": False}
    ax.plot(
        runs["lr"][finite],
        losses[finite].clip(upper=top),
        marker=style.marker,
        mec="white",
        zorder=4,
        **points,
    )
    if (~finite).any():
        crosses = np.full((~finite).sum(), top)
        ax.plot(runs["lr"][~finite], crosses, marker="x", ms=5, mew=1.2, zorder=5, **points)
    label = style.label
    if np.isfinite(medians).any():
        best = medians.idxmin()
        ax.plot([best], [medians[best]], "o", ms=8, mfc="none", mec=style.colour, mew=0.9, zorder=5)
        edge = ", edge" if len(medians) > 1 and best in (medians.index.min(), medians.index.max()) else ""
        label += f": {medians[best]:.3f} at {best:.2g}{edge}"
    if diverged.any():
        label += f" ({diverged.sum()} of {len(runs)} diverged)"
    ax.plot([], [], color=style.colour, ls=style.dash, lw=1.0, marker=style.marker, mec="white", label=label)
