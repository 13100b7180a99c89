"""Whole figures from the panels of `analysis.figures`, as an experiment's file asks for them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.archive import choose
from analysis.canvas import PAGE, new_figure
from analysis.figures import (
    plot_loss,
    plot_lr_sensitivity,
    plot_max_logit,
    plot_polynomials,
    plot_spike_vs_stable,
    plot_switch,
)
from analysis.frames import Frames
from analysis.save import save_figure
from muonlab.errors import unknown_name

TRACE_COLUMNS = ["run", "arm", "seed", "status", "step", "tokens"]
Drawing = tuple[Figure, pd.DataFrame, str]


def draw_traces(frames: Frames, title: str = "", tau: float | None = None) -> Drawing:
    """Probe loss and max logit side by side."""
    fig, axes = new_figure(1, 2, width=PAGE, height=2.5)
    plot_loss(axes[0, 0], frames.steps, title=title)
    plot_max_logit(axes[0, 1], frames.steps, tau, legend=False)
    note = "Left: loss on one fixed held-out batch. Right: largest scaled attention logit of all layers and heads."
    return fig, frames.steps[[*TRACE_COLUMNS, "probe_loss", "max_logit"]], note


def draw_spike_vs_stable(
    frames: Frames, title: str = "", tau: float | None = None, window: int = 25
) -> Drawing:
    """Training loss, max logit and gradient norm under one another, spikes marked."""
    fig, axes = new_figure(3, 1, width=PAGE, height=5.2, sharex=True)
    plot_spike_vs_stable(axes[:, 0], frames.steps, tau, window=window, title=title)
    note = f"Loss and gradient norm: trailing mean of {window} steps over the raw trace; spikes found in the raw trace."
    drawn = ["train_loss", "max_logit", "grad_norm", "loss_spikes", "grad_spikes"]
    return fig, frames.steps[[*TRACE_COLUMNS, *drawn]], note


def draw_lr_sensitivity(frames: Frames, title: str = "") -> Drawing:
    """Validation loss over learning rate."""
    fig, axes = new_figure(1, 1)
    plot_lr_sensitivity(axes[0, 0], frames.runs, title=title)
    table = frames.runs[
        ["run", "arm", "seed", "status", "lr", "weight_decay", "tau", "val_loss", "max_logit"]
    ]
    return fig, table, "Line through medians; the optimum is ringed."


def draw_switch(
    frames: Frames, windows: list[list[int]], title: str = "", tau: float | None = None
) -> Drawing:
    """Probe loss above max logit, shaded where the clip is off."""
    fig, axes = new_figure(2, 1, width=PAGE, height=3.9, sharex=True)
    plot_switch(axes[:, 0], frames.steps, windows, tau, title=title)
    return fig, frames.steps[[*TRACE_COLUMNS, "probe_loss", "max_logit"]], "Shaded: the clip is off."


def draw_polynomials(table: pd.DataFrame, title: str = "") -> Drawing:
    """Newton-Schulz schedules over all singular values (panel "whole") and over small ones ("small")."""
    fig, axes = new_figure(1, 2, width=PAGE, height=2.5)
    plot_polynomials(axes[0, 0], table[table["panel"] == "whole"])
    plot_polynomials(axes[0, 1], table[table["panel"] == "small"], log=True)
    axes[0, 0].set_title(title)
    return fig, table, "Shaded: Jordan's accepted band, 0.7 to 1.3."


KINDS: dict[str, Callable[..., Drawing]] = {
    "traces": draw_traces,
    "spike_vs_stable": draw_spike_vs_stable,
    "lr_sensitivity": draw_lr_sensitivity,
    "switch": draw_switch,
    "polynomials": draw_polynomials,
}


def draw(spec: Mapping[str, Any], data: Frames | pd.DataFrame, folder: Path, made_by: str) -> dict[str, Path]:
    """Draw and save one figure.

    spec: `name` (of the files), `kind` (one of KINDS), `conditions` and `arms` (which runs; none: all), `about` (the
    caption's first sentence), and the kind's own settings. data: runs, or the table of a figure that shows none.
    made_by: the command and commit, the caption's last. Returns the paths by file type.
    """
    settings = dict(spec)
    name, kind = settings.pop("name"), settings.pop("kind")
    if kind not in KINDS:
        raise unknown_name("kind of figure", kind, KINDS)
    about, sample = settings.pop("about", ""), ""
    if isinstance(data, Frames):
        data = choose(data, settings.pop("conditions", ()), settings.pop("arms", ()))
        sample = _sample(data.runs)
    fig, table, note = KINDS[kind](data, **settings)
    caption = " ".join(f"{about} {note} {sample} {made_by}".split())
    return save_figure(fig, folder, name, table, caption=caption)


def _sample(runs: pd.DataFrame) -> str:
    """What the numbers rest on: "3 seeds an arm, 716,800 tokens a run"."""
    seeds = runs.groupby([c for c in ("condition", "arm", "lr") if c in runs])["seed"].nunique()
    count = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    plural = "seed" if seeds.max() == 1 else "seeds"
    tokens = sorted({f"{t:,.0f}" for t in runs["tokens"].dropna()}, key=len)
    diverged = int((runs["status"] == "diverged").sum())
    lost = f", {diverged} diverged" if diverged else ""
    spent = tokens[0] if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    return f"{len(runs)} runs, n = {count} {plural} each{lost}; {spent} tokens a run."
