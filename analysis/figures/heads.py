"""The max logit of every single head of one run."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.columns import axis_label
from analysis.drawing.layout import columns_of, line_per_level, only_outer_labels, small_multiples
from analysis.drawing.lines import set_log_axis, set_steps_axis
from analysis.drawing.palette import Style, lighter, styles
from analysis.drawing.panels import draw_tau
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames
from muonlab.errors import MuonlabError


@figure("heads")
def draw_heads(frames: Frames, title: str = "", tau: float | None = None, seed: int | None = None) -> Drawing:
    """The max logit of every head, a panel per arm. seed: the one that is drawn; None: the first."""
    heads = line_per_level(frames).heads
    if heads.empty:
        raise MuonlabError("no head's logits were kept; set `heads: true` on the experiment's condition")
    seed = heads["seed"].min() if seed is None else seed
    heads = heads[heads["seed"] == seed]
    arms = list(dict.fromkeys(heads["arm"]))
    fig, axes = small_multiples(len(arms), 2.1)
    limits = head_limits(heads, tau)
    for ax, arm in zip(axes, arms, strict=True):
        plot_heads(ax, heads[heads["arm"] == arm], tau, limits)
    only_outer_labels(axes)
    if title:
        fig.suptitle(title)
    table: pd.DataFrame = columns_of(
        heads, ["run", "condition", "arm", "seed", "step", "layer", "head", "value", "gamma"]
    )
    count = np.unique(heads[["layer", "head"]], axis=0).shape[0]
    return fig, table, f"One line a head ({count}), deeper layers lighter; seed {seed} alone is drawn."


def plot_heads(ax: Axes, frame: pd.DataFrame, tau: float | None, limits: tuple[float, float]) -> None:
    """A thin line per head over steps, log axis, the deeper the layer the lighter; a dashed line at `tau`.

    frame: `Frames.heads` of one run (arm, step, layer, head, value). Readings at or below zero are left out. limits:
    of the axis, shared by panels that are compared. Raises MuonlabError where no head was kept.
    """
    frame = frame[np.isfinite(frame["value"]) & (frame["value"] > 0)]
    if frame.empty:
        raise MuonlabError("no head's logits were kept; set `heads: true` on the experiment's condition")
    style = next(iter(styles(frame["arm"]).values()))
    last = max(int(frame["layer"].max()), 1)
    for _, head in frame.groupby(["layer", "head"]):
        layer = int(head["layer"].iloc[0])
        ax.plot(head["step"], head["value"], color=shade(style, layer, last), lw=0.5, zorder=3, gid="head")
    low, high = limits
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    set_log_axis(ax.yaxis, low, high)
    draw_tau(ax, tau)
    ax.set_ylabel(axis_label("max_logit"))
    set_steps_axis(ax, frame)
    ax.set_title(style.label)


def head_limits(frame: pd.DataFrame, tau: float | None) -> tuple[float, float]:
    """An axis that shows every head from the first percentile on, and tau."""
    positive = frame.loc[np.isfinite(frame["value"]) & (frame["value"] > 0), "value"]
    return positive.quantile(0.01) / 1.2, max(positive.max(), tau or 0) * 1.3


def shade(style: Style, layer: int, last: int) -> str:
    """The first layer in the arm's colour, the last one in its lightest."""
    return lighter(style.colour, 0.6 * layer / last)
