"""Whole figures over steps: traces, spikes, the switch, crossings, rise and fall, spectra, mechanism, heads."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.canvas import PAGE, new_figure, panel_columns, panel_place
from analysis.figures import (
    plot_column,
    plot_crossing,
    plot_heads,
    plot_loss,
    plot_max_logit,
    plot_mechanism,
    plot_spike_vs_stable,
    plot_switch,
)
from analysis.figures.columns import expand_columns
from analysis.figures.heads import head_limits
from analysis.figures.traces import centred_mean, draw_rate_axis, hide_steps_labels
from analysis.frames import Frames
from analysis.layouts.drawing import (
    BOLD,
    TRACE_COLUMNS,
    Drawing,
    clock_by_arm,
    kept,
    legend_above,
    line_per_level,
    only_outer_labels,
    share_limits,
    share_near_limits,
    small_multiples,
)
from analysis.palette import styles
from muonlab.errors import MuonlabError

CLOCK_NOTE = "An arm without decay is drawn on the slowest clock of the others."


def draw_traces(
    frames: Frames, title: str = "", tau: float | None = None, x: str = "", rates: bool = False
) -> Drawing:
    """Probe loss and max logit side by side; with `rates` the learning rate is a second axis above, for a ramp."""
    steps = line_per_level(frames, x).steps
    fig, axes = new_figure(1, 2, width=PAGE, height=2.5)
    plot_loss(axes[0, 0], steps, title=title or "Held-out loss")
    plot_max_logit(axes[0, 1], steps, tau, title="Largest attention logit")
    for ax in axes[0] if rates else ():
        draw_rate_axis(ax, steps)
    legend_above(fig, axes[0, :1])
    note = f"Left: loss on one fixed held-out batch. Right: largest logit of all layers and heads. {BOLD}"
    return fig, kept(steps, [*TRACE_COLUMNS, "probe_loss", "max_logit"]), note


def draw_spike_vs_stable(
    frames: Frames, title: str = "", tau: float | None = None, window: int = 25, x: str = ""
) -> Drawing:
    """Training loss, max logit and gradient norm under one another, spikes marked."""
    steps = line_per_level(frames, x).steps
    fig, axes = new_figure(3, 1, width=PAGE, height=5.2, sharex=True)
    plot_spike_vs_stable(list(axes[:, 0]), steps, tau, window=window, title=title)
    legend_above(fig, axes[:1, 0])
    note = f"Loss and gradient norm: centred mean of {window} steps over the raw trace, spikes of the raw one. {BOLD}"
    drawn = ["train_loss", "max_logit", "grad_norm", "loss_spikes", "grad_spikes"]
    return fig, kept(steps, [*TRACE_COLUMNS, *drawn]), note


def draw_switch(
    frames: Frames,
    windows: Sequence[Sequence[int]] | None = None,
    title: str = "",
    tau: float | None = None,
    x: str = "",
) -> Drawing:
    """Probe loss above max logit, shaded where the clip is off: outside `windows`, by default the condition's."""
    if not windows:
        raise MuonlabError("a figure of the switch needs `windows`; set them on its condition")
    steps = line_per_level(frames, x).steps
    fig, axes = new_figure(2, 1, width=PAGE, height=3.9, sharex=True)
    plot_switch(list(axes[:, 0]), steps, windows, tau, title=title)
    legend_above(fig, axes[:1, 0])
    return fig, kept(steps, [*TRACE_COLUMNS, "probe_loss", "max_logit"]), f"Shaded: the clip is off. {BOLD}"


def draw_crossing(
    frames: Frames,
    title: str = "",
    baseline: str = "",
    x: str = "",
    column: str = "probe_loss",
    clock: bool = False,
) -> Drawing:
    """Loss over steps, and every line's paired difference to the baseline's beneath.

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
    return fig, kept(steps, [*TRACE_COLUMNS, column]).dropna(subset=[column]), note


def draw_rise_and_fall(
    frames: Frames,
    title: str = "",
    tau: float | None = None,
    window: int = 25,
    x: str = "",
    clock: bool = False,
) -> Drawing:
    """Loss, max logit, gradient norm and, where a clip ran, its activity, over steps or over 1 / (lr x decay)."""
    frames = line_per_level(frames, x)
    steps = frames.steps.assign(clipped=_clipping_share(frames.steps, window))
    if clock:
        steps["clock"] = steps["arm"].map(clock_by_arm(frames.runs))
    drawn = ["probe_loss", "max_logit", "grad_norm"]
    drawn += ["clipped"] if (steps["gamma"] < 1).any() else []
    fig, axes = small_multiples(len(drawn), 1.9, columns=2 if len(drawn) == 4 else 3)
    for ax, column in zip(axes, drawn, strict=True):
        if column == "probe_loss":
            plot_loss(ax, steps, title=title or "Held-out loss")
        elif column == "max_logit":
            plot_max_logit(ax, steps, tau, title="Largest attention logit")
        elif column == "grad_norm":
            plot_column(ax, steps, column, window, title="Gradient norm")
        else:
            plot_column(ax, steps, column, title="Steps that clip")
    legend_above(fig, axes[:1])
    smooth = "Gradient norm and share of clipping steps" if "clipped" in drawn else "Gradient norm"
    note = f"{smooth}: centred mean of {window} steps. {CLOCK_NOTE if clock else ''} {BOLD}"
    return fig, kept(steps, [*TRACE_COLUMNS, "clock", "probe_loss", "max_logit", "grad_norm", "gamma"]), note


def draw_spectra(
    frames: Frames,
    columns: list[str] | None = None,
    title: str = "",
    x: str = "",
    over: str = "",
    window: int = 1,
) -> Drawing:
    """A panel a recorded column; "svd_entropy/*" is a panel a role, or with `over` (mean, max, min) one for all."""
    wanted = columns or ["svd_entropy/*"]
    steps = line_per_level(frames, x).steps
    if over:
        for name in wanted:
            family = expand_columns(steps, [name])
            steps = steps.assign(**{name.removesuffix("/*"): steps[family].agg(over, axis="columns")})
        drawn = [name.removesuffix("/*") for name in wanted]
    else:
        drawn = expand_columns(steps, wanted)
    families = {name.partition("/")[0] for name in drawn}
    fig, axes = small_multiples(len(drawn), 1.75)
    for ax, column in zip(axes, drawn, strict=True):
        role = column if over else column.rpartition("/")[2]
        plot_column(ax, steps, column, window, title=_heading(role))
    if len(families) == 1 and len(drawn) > 1 and not over:
        share_near_limits(axes)
        only_outer_labels(axes)
    for ax in axes:
        place = panel_place(ax)
        if place.rowspan.stop * panel_columns(ax) + place.colspan.start < len(axes):
            hide_steps_labels(ax)
    if title:
        fig.suptitle(title)
    legend_above(fig, axes[:1])
    note = f"At each step the {over} over all layers." if over else ""
    note += f" Centred mean of {window} steps." if window > 1 else ""
    note += f" {BOLD}"
    return fig, kept(steps, [*TRACE_COLUMNS, *drawn]).dropna(subset=drawn, how="all"), note.strip()


def draw_balance(
    frames: Frames, title: str = "", x: str = "", over: str = "mean", window: int = 25
) -> Drawing:
    """Load violation of the experts and entropy of the router over steps."""
    recorded = [
        c
        for c in ("balance/violation", "router/entropy")
        if any(n.startswith(c) for n in frames.steps.columns)
    ]
    if not recorded:
        raise MuonlabError("no run recorded expert loads; they are those of mixtures of experts")
    return draw_spectra(frames, [f"{name}/*" for name in recorded], title, x, over, window)


def draw_mechanism(frames: Frames, title: str = "", x: str = "") -> Drawing:
    """The growth of the largest logit in parts, a panel an arm."""
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
    table = kept(steps, [*TRACE_COLUMNS, *parts]).dropna(subset=parts, how="all")
    return fig, table, "Medians over seeds; log10 of the largest logit is the sum of the parts."


def draw_heads(frames: Frames, title: str = "", tau: float | None = None, seed: int | None = None) -> Drawing:
    """Every head's max logit, a panel an arm, of one seed (None: the first)."""
    heads = line_per_level(frames).heads
    if heads.empty:
        raise MuonlabError("no head's logits were kept; set `heads: true` on the experiment's condition")
    seed = heads["seed"].min() if seed is None else seed
    heads = heads[heads["seed"] == seed]
    arms = list(dict.fromkeys(heads["arm"]))
    fig, axes = small_multiples(len(arms), 2.1)
    limits = head_limits(heads, tau)
    for ax, arm in zip(axes, arms, strict=True):
        plot_heads(ax, heads[heads["arm"] == arm], tau, limits=limits)
    only_outer_labels(axes)
    if title:
        fig.suptitle(title)
    table: pd.DataFrame = kept(
        heads, ["run", "condition", "arm", "seed", "step", "layer", "head", "value", "gamma"]
    )
    count = np.unique(heads[["layer", "head"]], axis=0).shape[0]
    return fig, table, f"One line a head ({count}), deeper layers lighter; seed {seed} alone is drawn."


def _clipping_share(steps: pd.DataFrame, window: int) -> pd.Series:
    """For each row the share of the `window` steps around it, of the same run, in which a head was clipped."""
    share = pd.Series(np.nan, index=steps.index)
    for _, run in steps[steps["gamma"].notna()].groupby(["arm", "run"], sort=False):
        clips = pd.Series((run["gamma"] < 1).to_numpy(float), index=run["step"])
        share[run.index] = centred_mean(clips, window).to_numpy()
    return share


def _heading(role: str) -> str:
    words = role.replace("_", " ").replace("/", " ")
    return "MLP" if words == "mlp" else words[:1].upper() + words[1:]
