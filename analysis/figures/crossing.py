"""Loss of several arms over steps, and below it each arm's paired difference to a baseline with its interval."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.drawing.canvas import PAGE, new_figure
from analysis.drawing.layout import TRACE_COLUMNS, clock_by_arm, columns_of, legend_above, line_per_level
from analysis.drawing.lines import clock_of, hide_steps_labels, set_steps_axis
from analysis.drawing.palette import styles
from analysis.drawing.panels import plot_loss
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames
from analysis.inference import t_interval
from muonlab.errors import MuonlabError


@figure("crossing")
def draw_crossing(
    frames: Frames,
    title: str = "",
    baseline: str = "",
    x: str = "",
    column: str = "probe_loss",
    clock: bool = False,
) -> Drawing:
    """Loss over steps, and below it the paired difference of every line to the baseline.

    baseline: a line's name, arm and level ("muon 0"); "" takes the first. clock: the axis counts 1 / (lr x decay), with
    the product of the first line that has decay.
    """
    frames = line_per_level(frames, x)
    steps = frames.steps
    if clock:
        steps = steps.assign(clock=clock_by_arm(frames.runs).min())
    baseline = baseline or steps["arm"].iloc[0]
    fig, axes = new_figure(2, 1, width=PAGE, height=3.7, height_ratios=(3, 2))
    plot_crossing(list(axes[:, 0]), steps, baseline, column, title=title)
    legend_above(fig, axes[:1, 0])
    name = styles(steps["arm"])[baseline].label
    note = (
        f"Below: minus {name}, paired over seeds, with the 95% interval of the mean; below zero an arm leads."
    )
    return fig, columns_of(steps, [*TRACE_COLUMNS, column]).dropna(subset=[column]), note


def plot_crossing(
    axes: Sequence[Axes], frame: pd.DataFrame, baseline: str, column: str = "probe_loss", title: str = ""
) -> None:
    """Loss above; below, loss minus the baseline's at the same step and seed: below zero an arm leads.

    axes: two axes, top and bottom. frame: `Frames.steps` (run, arm, seed, status, step and `column`); a `clock`
    must be the same for all of it. The band is the 95 % t interval of the mean over seeds, drawn from two
    seeds on; the thin lines are the seeds. Raises MuonlabError where no arm shares a seed with the baseline.
    """
    top, bottom = axes
    plot_loss(top, frame, column, title=title)
    hide_steps_labels(top)
    pairs = 0
    for arm, style in styles(frame["arm"]).items():
        if arm == baseline:
            continue
        differences = paired_differences(frame, arm, baseline, column)
        differences.index = differences.index * clock_of(frame)
        pairs += len(differences.columns)
        for seed in differences if len(differences.columns) > 1 else ():
            ax_line = differences[seed].dropna()
            bottom.plot(ax_line.index, ax_line, color=style.colour, alpha=0.4, lw=0.5, zorder=3, gid="seed")
        complete = differences.dropna()
        bottom.plot(
            complete.index, complete.mean(axis=1), color=style.colour, ls=style.dash, zorder=4, gid="mean"
        )
        if len(differences.columns) > 1 and len(complete):
            ends = [t_interval(row) for row in complete.to_numpy()]
            low, high = [i.low for i in ends], [i.high for i in ends]
            bottom.fill_between(complete.index, low, high, color=style.colour, alpha=0.18, lw=0, zorder=2)
    if not pairs:
        raise MuonlabError(f"no arm has a seed in common with the baseline '{baseline}'")
    bottom.axhline(0, color="#4d4d4d", lw=0.7, zorder=1)
    _limit_differences(bottom)
    bottom.set_ylabel("minus the baseline's\n(nats)")
    set_steps_axis(bottom, frame)


def paired_differences(frame: pd.DataFrame, arm: str, baseline: str, column: str) -> pd.DataFrame:
    """arm - baseline by step (index) and seed (columns), over the seeds that both have."""
    tables = [
        frame[frame["arm"] == name].pivot_table(index="step", columns="seed", values=column)
        for name in (arm, baseline)
    ]
    return (tables[0] - tables[1]).dropna(how="all").dropna(axis="columns", how="all")


def _limit_differences(ax: Axes) -> None:
    """Cut the axis to the differences after the first tenth, where early training does not flatten them."""
    means = [line for line in ax.lines if line.get_gid() == "mean"]
    steps = [np.asarray(line.get_xdata(), float) for line in means]
    last = max(x.max() for x in steps if len(x))
    later = []
    for line in ax.lines:
        if line.get_gid() in ("mean", "seed"):
            x, y = (np.asarray(data, float) for data in line.get_data())
            later.append(y[x >= 0.1 * last])
    values = np.concatenate([*later, [0.0]])
    span = np.ptp(values) or 0.01
    ax.set_ylim(values.min() - 0.1 * span, values.max() + 0.1 * span)
