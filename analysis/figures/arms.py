"""Many arms against one baseline: what each costs or gains in loss, and how large its logits get."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from analysis.comparison import Paired, compare_arms
from analysis.drawing.canvas import PAGE, Look, new_figure
from analysis.drawing.layout import RUN_COLUMNS, columns_of, with_conditions
from analysis.drawing.lines import mark_divergence, set_log_axis
from analysis.drawing.palette import Style, styles
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames

BAND = "#efefef"


@figure("arms")
def draw_arms(
    frames: Frames,
    baseline: str = "muon",
    metric: str = "loss",
    tau: float | None = None,
    levels: Sequence[float] = (),
    title: str = "",
) -> Drawing:
    """For each condition the arms' paired differences in loss to the baseline, and their max logits beside them.

    levels: those of the conditions that have panels of their own, where arms have several; none: a panel per condition.
    """
    frames = with_conditions(frames)
    runs = frames.runs[frames.runs["level"].isin(levels)] if levels else frames.runs
    panels = list(runs.groupby(["condition", "level"] if levels else ["condition"], sort=False))
    arms = list(dict.fromkeys(runs["arm"]))
    height = 0.75 + 0.17 * len(arms)
    fig, axes = new_figure(1, 2 * len(panels), width=PAGE, height=height, sharey=True)
    for column, (key, panel) in enumerate(panels):
        left, right = axes[0, 2 * column : 2 * column + 2]
        name = " x".join(part if isinstance(part, str) else f"{part:g}" for part in key).replace("_", " ")
        plot_differences(left, panel, baseline, metric, name if len(panels) > 1 else title, arms)
        plot_logit_dots(right, panel, tau, arms)
        for ax in (left, right) if column else (right,):
            ax.tick_params(labelleft=False)
    if title and len(panels) > 1:
        fig.suptitle(title)
    note = "Ticks are seeds, markers means (right: medians), bars 95% intervals of the paired mean; "
    note += "grey: the standard deviation over the seeds of an arm."
    return fig, columns_of(runs, [*RUN_COLUMNS, metric, "end_max_logit"]), note


def plot_differences(
    ax: Axes, frame: pd.DataFrame, baseline: str, metric: str, title: str, arms: list[str]
) -> None:
    """Paired differences of every arm's loss to the baseline's: a tick per seed, a bar for their mean's 95 % interval.

    frame: `Frames.runs` of one condition. arms: rows from top to bottom. The grey band of a row is its noise floor,
    the standard deviation over seeds of one arm. Arms that are far worse than the rest are drawn at the right edge with
    their mean beside them, and so is the number of diverged seeds, which count with the loss at initialisation.
    """
    names = styles(arms)
    rows = {
        arm: compare_arms(frame, arm, baseline, metric)
        for arm in names
        if arm in set(frame["arm"]) and arm != baseline
    }
    usual = _usual([0.0, *(paired.difference.estimate for paired in rows.values())])
    inside = {arm: paired for arm, paired in rows.items() if paired.difference.estimate <= usual}
    edge = max([usual, *(1.04 * max(_span(paired)) for paired in inside.values())])
    ax.axvline(0, color="#8c8c8c", lw=0.7, zorder=1)
    for place, (arm, style) in enumerate(names.items()):
        if arm == baseline:
            ax.plot([0], [place], ms=4.5, zorder=5, gid="mean", **style.points)
        if arm not in rows:
            continue
        paired = rows[arm]
        mean = paired.difference.estimate
        band = Rectangle((-paired.floor, place - 0.5), 2 * paired.floor, 1, color=BAND, lw=0, zorder=0.5)
        band.set_gid("noise floor")
        ax.add_patch(band)
        if arm in inside:
            _draw_row(ax, place, paired, style)
        else:
            ax.plot([edge], [place], ">", color=style.colour, ms=5, clip_on=False, zorder=5, gid="beyond")
        diverged = int((frame.loc[frame["arm"] == arm, "status"] == "diverged").sum())
        notes = [] if arm in inside else [f"{mean:+.2f}"]
        notes += [f"{diverged} of {len(paired.seeds)} diverged"] if diverged else []
        words: Look = {"ha": "right", "va": "center", "fontsize": 6, "color": "#4d4d4d"}
        if notes:
            ax.annotate(", ".join(notes), (edge, place), (-5, 0), textcoords="offset points", **words)
    low = min([0.0, *(min(-paired.floor, *_span(paired)) for paired in inside.values())])
    ax.set_xlim(low - 0.05 * (edge - low), edge)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    _name_rows(ax, names)
    against = styles([baseline])[baseline].label
    ax.set_xlabel(f"loss minus {against}'s (nats)")
    ax.set_title(title)


def _draw_row(ax: Axes, place: int, paired: Paired, style: Style) -> None:
    mean = paired.difference
    look: Look = {"color": style.colour}
    if np.isfinite(mean.low):
        ax.plot([mean.low, mean.high], [place, place], lw=2.0, alpha=0.45, zorder=3, gid="interval", **look)
    ax.plot(paired.differences, [place] * len(paired.seeds), "|", ms=5, mew=0.8, zorder=4, **look)
    ax.plot([mean.estimate], [place], ms=4.5, zorder=5, gid="mean", **style.points)


def _span(paired: Paired) -> tuple[float, float]:
    """What a row shows: its seeds, and its interval where there is one."""
    ends = [paired.difference.low, paired.difference.high, *paired.differences]
    return float(np.nanmin(ends)), float(np.nanmax(ends))


def plot_logit_dots(ax: Axes, frame: pd.DataFrame, tau: float | None, arms: list[str]) -> None:
    """Max logit at the end by arm, log axis: a tick per seed, a marker at the median, a line at `tau`.

    frame, arms: as for `plot_differences`; a diverged seed is a cross at the right edge.
    """
    names = styles(arms)
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
            ax.plot(median, [place], ms=4.5, zorder=5, gid="median", **style.points)
        if lost.any():
            mark_divergence(ax, [high], [place], style)
    if tau is not None:
        ax.axvline(tau, color="#262626", lw=0.8, ls=(0, (3, 2)), zorder=2, gid="tau")
        words: Look = {"ha": "center", "va": "bottom", "fontsize": 6.5, "color": "#262626"}
        ax.text(tau, 1.01, f"τ = {tau:g}", transform=ax.get_xaxis_transform(), **words)
    set_log_axis(ax.xaxis, low, high, narrow=True)
    _name_rows(ax, names)
    ax.set_xlabel("max logit at the end")


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
