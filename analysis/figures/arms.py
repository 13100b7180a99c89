"""Many arms against one baseline: what each costs or gains in loss, and how large its logits get."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.canvas import Look, styled
from analysis.figures.traces import mark_divergence, set_log_axis
from analysis.palette import styles
from analysis.statistics import compare

BAND = "#efefef"


@dataclass(frozen=True)
class ArmRow:
    """One arm's paired differences in loss to the baseline by seed, and its interval of their mean."""

    differences: np.ndarray
    low: float
    mean: float
    high: float
    floor: float
    diverged: int


@styled
def plot_differences(
    ax: Axes,
    frame: pd.DataFrame,
    baseline: str,
    metric: str = "loss",
    title: str = "",
    arms: list[str] | None = None,
) -> None:
    """Paired difference of every arm's loss to the baseline's: a point a seed, a bar for the 95 % interval of the mean.

    frame: `Frames.runs` of one condition. arms: rows from top to bottom; None takes the frame's. The grey band is the
    largest noise floor of any row: beyond it no difference is within the noise; inside it one may still exceed the
    floor of its own row. Arms that are far worse than the rest are drawn at the right edge with their mean beside them.
    The number of diverged seeds, which count with the loss at initialisation, is written there too.
    """
    names = styles(arms or frame["arm"])
    rows = {arm: _row(frame, arm, baseline, metric) for arm in names if arm in set(frame["arm"])}
    usual = _usual([row.mean for row in rows.values()])
    inside = [row for row in rows.values() if row.mean <= usual]
    edge = max([usual, *(1.04 * max(row.high, row.differences.max()) for row in inside)])
    floor = np.nanmax([row.floor for row in rows.values()])
    ax.axvspan(-floor, floor, color=BAND, lw=0, zorder=0.5, gid="noise floor")
    ax.axvline(0, color="#8c8c8c", lw=0.7, zorder=1)
    for place, (arm, style) in enumerate(names.items()):
        if (row := rows.get(arm)) is None:
            continue
        if row.mean > usual:
            ax.plot([edge], [place], ">", color=style.colour, ms=5, clip_on=False, zorder=5, gid="beyond")
        else:
            ax.plot([row.low, row.high], [place, place], color=style.colour, lw=2.0, alpha=0.45, zorder=3)
            ax.plot(
                row.differences,
                [place] * len(row.differences),
                "|",
                color=style.colour,
                ms=5,
                mew=0.8,
                zorder=4,
            )
            ax.plot(
                [row.mean],
                [place],
                style.marker,
                color=style.colour,
                mec="white",
                ms=4.5,
                zorder=5,
                gid="mean",
            )
        said = [f"{row.mean:+.2f}"] if row.mean > usual else []
        said += [f"{row.diverged} of {len(row.differences)} diverged"] if row.diverged else []
        words: Look = {"ha": "right", "va": "center", "fontsize": 6, "color": "#4d4d4d"}
        if said:
            ax.annotate(", ".join(said), (edge, place), (-5, 0), textcoords="offset points", **words)
    low = min([-floor, *(min(row.low, row.differences.min()) for row in inside)])
    ax.set_xlim(low - 0.05 * (edge - low), edge)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    _name_rows(ax, names)
    against = styles([baseline])[baseline].label
    ax.set_xlabel(f"loss minus {against}'s (nats)")
    ax.set_title(title)


@styled
def plot_logit_dots(
    ax: Axes, frame: pd.DataFrame, tau: float | None = None, title: str = "", arms: list[str] | None = None
) -> None:
    """Max logit at the end by arm, log axis: a tick a seed, a marker at the median, a line at `tau`.

    frame, arms: as for `plot_differences`; a diverged seed is a cross at the right edge.
    """
    names = styles(arms or frame["arm"])
    values = frame.loc[(frame["end_max_logit"] > 0) & (frame["status"] != "diverged"), "end_max_logit"]
    low, high = values.min() / 1.6, max(values.max(), tau or 0) * 1.6
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    for place, (arm, style) in enumerate(names.items()):
        runs = frame[frame["arm"] == arm]
        lost = runs["status"] == "diverged"
        settled = runs.loc[~lost, "end_max_logit"]
        ax.plot(settled, [place] * len(settled), "|", color=style.colour, ms=5, mew=0.8, zorder=4)
        if len(settled):
            median = [settled.median()]
            ax.plot(
                median, [place], style.marker, color=style.colour, mec="white", ms=4.5, zorder=5, gid="median"
            )
        if lost.any():
            mark_divergence(ax, [high], [place], style)
    if tau is not None:
        ax.axvline(tau, color="#262626", lw=0.8, ls=(0, (3, 2)), zorder=2, gid="tau")
        words: Look = {"ha": "center", "va": "bottom", "fontsize": 6.5, "color": "#262626"}
        ax.text(tau, 1.01, f"τ = {tau:g}", transform=ax.get_xaxis_transform(), **words)
    set_log_axis(ax.xaxis, low, high, narrow=True)
    _name_rows(ax, names)
    ax.set_xlabel("max logit at the end")
    ax.set_title(title)


def _row(frame: pd.DataFrame, arm: str, baseline: str, metric: str) -> ArmRow:
    runs = frame[frame["arm"] == arm].set_index("seed")
    diverged = int((runs["status"] == "diverged").sum())
    if arm == baseline:
        return ArmRow(np.zeros(1), 0.0, 0.0, 0.0, np.nan, diverged)
    found = compare(frame, arm, baseline, metric)
    others = frame[frame["arm"] == baseline].set_index("seed")[metric]
    differences = (runs[metric] - others).dropna().to_numpy()
    mean = found.difference
    low, high = (mean.estimate,) * 2 if np.isnan(mean.low) else (mean.low, mean.high)
    return ArmRow(differences, low, mean.estimate, high, found.floor, diverged)


def _usual(means: list[float]) -> float:
    """Where the means of usual arms end: beyond all of them, unless a few lie far beyond the others."""
    ordered = np.sort(np.abs(means))
    usual = 3 * ordered[: max(2, round(0.75 * len(ordered)))].max() + 0.02
    return float(min(1.25 * max(max(means), 0) + 0.02, usual))


def _name_rows(ax: Axes, names: dict) -> None:
    ax.set_yticks(range(len(names)), [style.label for style in names.values()])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
