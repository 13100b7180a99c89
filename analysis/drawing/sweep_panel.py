"""A panel of one number of each run over the levels that a sweep tried."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.columns import axis_label, is_logarithmic
from analysis.drawing.canvas import Look
from analysis.drawing.level_axis import DIGITS, level_axis, level_text
from analysis.drawing.lines import mark_divergence, set_log_axis
from analysis.drawing.palette import Style, styles
from analysis.inference import t_interval
from muonlab.errors import MuonlabError

FEW_SEEDS = 3  # up to this number, seeds are drawn as points, more as the interval of their mean


def plot_levels(
    ax: Axes,
    frame: pd.DataFrame,
    metric: str = "val_loss",
    x: str = "learning rate",
    log: bool = True,
    cut: bool = False,
    title: str = "",
    best: bool = True,
    name_best: bool = True,
) -> None:
    """`metric` over `level` by arm: a line through the medians, seeds as points or as the 95 % interval of their mean.

    frame: `Frames.runs` (arm, level, status and `metric`). Up to three seeds per level are drawn as points, more as
    their mean's t interval. A run that diverged counts as the worst and is a cross at the top of the axis; a value that
    is infinite because a target was never reached is an open marker there. An arm that varies nothing (level
    NaN) is a horizontal line at its median. x: what the level is; log: its axis is logarithmic. cut: end the axis above
    the basin, so that the worst levels do not flatten it; they are drawn on a dotted ceiling. best: ring each arm's
    lowest median; name_best: write it into the legend too. Raises MuonlabError where no run has a finite value.
    """
    ended = frame[(frame["status"] == "diverged") | frame[metric].notna()]
    values = ended[metric].mask(ended["status"] == "diverged", np.inf)
    finite = values[np.isfinite(values)]
    if finite.empty:
        raise MuonlabError(f"there is no {metric} to draw over {x}: no run finished with a finite one")
    ended = ended.assign(value=values)
    axis = level_axis(ended["level"].dropna(), log)
    low, ceiling = finite.min(), _ceiling(finite, len(finite) < len(values), cut, is_logarithmic(metric))
    fixed, swept = ended[ended["level"].isna()], ended[ended["level"].notna()]
    names = list(dict.fromkeys(swept["arm"]))
    for arm, style in styles(ended["arm"]).items():
        if arm in set(fixed["arm"]):
            median = min(fixed.loc[fixed["arm"] == arm, "value"].median(), ceiling)
            look: Look = {"color": style.colour, "ls": style.dash, "lw": 1.0, "alpha": 0.8, "zorder": 2}
            ax.axhline(median, label=style.label, gid="fixed", **look)
        if arm in names:
            shift = (names.index(arm) - (len(names) - 1) / 2) * axis.dodge(len(names))
            rows = swept[swept["arm"] == arm]
            rows = rows.assign(place=axis.place(rows["level"]) + shift, joined=axis.joins(rows["level"]))
            _draw_arm(ax, rows, ceiling, style, best, name_best)
    ends = [np.asarray(line.get_ydata(), float)[0] for line in ax.lines if line.get_gid() == "interval"]
    _limit(ax, min([low, *ends]), ceiling, is_logarithmic(metric))
    reasons = ["diverged"] if (ended["status"] == "diverged").any() else []
    reasons += ["never reached"] if (np.isinf(values) & (ended["status"] != "diverged")).any() else []
    reasons += ["worse than this"] if finite.max() > ceiling else []
    if reasons:
        _draw_ceiling(ax, ceiling, ", or ".join(reasons))
    axis.draw(ax, x)
    ax.set_ylabel(axis_label(metric))
    ax.set_title(title)


def draw_reference(ax: Axes, value: float, text: str) -> None:
    """A thin dashed line across the panel with its name above it, in the corner: the loss of a uniform guess, tau."""
    low, high = ax.get_ylim()
    if not low < value < high:
        ax.set_ylim(min(low, value * 0.97), max(high, value * 1.03))
    ax.axhline(value, color="#262626", lw=0.7, ls=(0, (3, 2)), zorder=1.5, gid="reference")
    words: Look = {"ha": "left", "va": "bottom", "fontsize": 6, "color": "#262626"}
    place: Look = {"xycoords": ("axes fraction", "data"), "xytext": (2, 1.5), "textcoords": "offset points"}
    ax.annotate(text, (0, value), **place, **words)


def _ceiling(finite: pd.Series, lost: bool, cut: bool, log: bool) -> float:
    """The value at which worse and diverged runs are drawn."""
    low, high = finite.min(), finite.max()
    if cut:
        return low + 1.3 * max(0.02, finite.quantile(0.75) - low)
    if not lost:
        return high
    return high * (high / low) ** 0.12 if log and low > 0 else high + 0.12 * ((high - low) or abs(high) or 1)


def _draw_arm(
    ax: Axes, runs: pd.DataFrame, ceiling: float, style: Style, best: bool, name_best: bool
) -> None:
    medians = runs.groupby("place")["value"].median()
    line = medians[medians.index.isin(runs.loc[runs["joined"], "place"])].clip(upper=ceiling)
    look: Look = {"color": style.colour, "ls": style.dash, "lw": 1.0}
    ax.plot(line.index, line, zorder=3, gid="medians", **look)
    for _, rows in runs.groupby("place"):
        _draw_seeds(ax, float(rows["place"].iloc[0]), rows, ceiling, style)
    label = style.label
    if best and np.isfinite(medians).any():
        ring: Look = {"mfc": "none", "mec": style.colour, "mew": 0.9, "ms": 8, "gid": "optimum"}
        ax.plot(medians.index[[int(medians.argmin())]], [medians.min()], "o", zorder=5, **ring)
        label += _describe_best(runs, medians) if name_best else ""
    if lost := int((runs["status"] == "diverged").sum()):
        label += f" ({lost} of {len(runs)} diverged)"
    ax.plot([], [], label=label, **style.points | look)


def _draw_seeds(ax: Axes, place: float, rows: pd.DataFrame, ceiling: float, style: Style) -> None:
    dot: Look = style.points | {"zorder": 4}
    lost = rows["status"] == "diverged"
    reached = rows.loc[np.isfinite(rows["value"]), "value"]
    if len(rows) > FEW_SEEDS and len(reached) == len(rows):
        mean = t_interval(reached)
        ends = np.minimum([mean.low, mean.high], ceiling)
        ax.plot([place, place], ends, color=style.colour, lw=1.0, zorder=4, gid="interval")
        ax.plot([place], [min(ceiling, rows["value"].median())], **dot)
        return
    ax.plot([place] * len(reached), reached.clip(upper=ceiling), gid="seeds", **dot)
    if never := int((~lost & ~np.isfinite(rows["value"])).sum()):
        ax.plot(
            [place] * never, [ceiling] * never, gid="censored", **dot | {"mfc": "white", "mec": style.colour}
        )
    if lost.any():
        mark_divergence(ax, [place] * int(lost.sum()), [ceiling] * int(lost.sum()), style)


def _describe_best(runs: pd.DataFrame, medians: pd.Series) -> str:
    """ ": 1.234 at 0.01", and ", edge" at the first or last of the numbers tried, beyond which a better may lie."""
    at = runs[runs["place"] == medians.idxmin()].iloc[0]
    numbers = runs.loc[runs["joined"], "place"]
    edge = at["joined"] and numbers.nunique() > 1 and at["place"] in (numbers.min(), numbers.max())
    return f": {medians.min():.3f} at {level_text(at['level'], DIGITS)}" + (", edge" if edge else "")


def _limit(ax: Axes, low: float, top: float, log: bool) -> None:
    if log and low > 0:
        ax.set_yscale("log")
        margin = max(1.15, (top / low) ** 0.06)
        ax.set_ylim(low / margin, top * margin)
        set_log_axis(ax.yaxis, low / margin, top * margin)
        return
    span = (top - low) or abs(top) or 1
    ax.set_ylim(low - 0.08 * span, top + 0.1 * span)


def _draw_ceiling(ax: Axes, ceiling: float, text: str) -> None:
    ax.axhline(ceiling, color="#8c8c8c", lw=0.6, ls=(0, (1, 2)), zorder=1, gid="ceiling")
    words: Look = {"ha": "right", "va": "bottom", "fontsize": 6, "color": "#4d4d4d"}
    place: Look = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3.5), "textcoords": "offset points"}
    ax.annotate(text, (1, ceiling), **place, **words)
