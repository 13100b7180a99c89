"""Whole figures that hold many arms against one: differences, targets, spikes."""

import numpy as np
import pandas as pd

from analysis.canvas import COLUMN, PAGE, new_figure
from analysis.figures import plot_differences, plot_logit_dots, plot_spike_events, plot_to_target
from analysis.figures.spike_events import PREFIX
from analysis.figures.to_target import CLOCKS
from analysis.frames import Frames
from analysis.layouts.drawing import Drawing, kept, legend_above, small_multiples, with_conditions
from analysis.measures import Part, measured
from analysis.palette import styles
from muonlab.errors import MuonlabError

SETTING = ["run", "condition", "arm", "level", "seed", "status", "lr"]
SCORES = ["olmo2_upward/train_loss", "olmo2_upward/grad_norm", "olmo2/grad_norm", "six_sigma/train_loss"]
SCORES += ["rolling_2x/train_loss", "zclip/grad_norm"]


def draw_arms(
    frames: Frames, baseline: str = "muon", metric: str = "loss", tau: float | None = None, title: str = ""
) -> Drawing:
    """For each condition the arms' paired differences in loss to the baseline, and their max logits beside them."""
    frames = with_conditions(frames)
    runs = frames.runs
    conditions, arms = list(dict.fromkeys(runs["condition"])), list(dict.fromkeys(runs["arm"]))
    height = 0.75 + 0.17 * len(arms)
    fig, axes = new_figure(1, 2 * len(conditions), width=PAGE, height=height, sharey=True)
    for column, condition in enumerate(conditions):
        left, right = axes[0, 2 * column : 2 * column + 2]
        chosen = runs[runs["condition"] == condition]
        name = condition.replace("_", " ") if len(conditions) > 1 else title
        plot_differences(left, chosen, baseline, metric, name, arms)
        plot_logit_dots(right, chosen, tau, "", arms)
        for ax in (left, right) if column else (right,):
            ax.tick_params(labelleft=False)
    if title and len(conditions) > 1:
        fig.suptitle(title)
    note = "Ticks are seeds, markers means (right: medians), bars 95% intervals of the paired mean; "
    note += "grey: the largest noise floor."
    return fig, kept(runs, [*SETTING, metric, "end_max_logit"]), note


def draw_to_target(
    frames: Frames, target: float, baseline: str = "adamw", column: str = "probe_loss", title: str = ""
) -> Drawing:
    """Steps, tokens, FLOPs and seconds until `column` first reads `target` (nats), over the baseline's."""
    table = spent_until(with_conditions(frames), target, column)
    fig, axes = new_figure(1, 1, width=COLUMN, height=0.75 + 0.38 * table["clock"].nunique())
    plot_to_target(axes[0, 0], table, baseline, title)
    legend_above(fig, list(axes.flat))
    label = column.replace("_", " ")
    note = (
        f"Until the {label} first reads {target:g}, interpolated. Ticks are seeds, bars 95% intervals of the "
    )
    return (
        fig,
        table,
        note + "geometric mean; open triangles: never reached, the ratio is at least (or at most) that.",
    )


def spent_until(frames: Frames, target: float, column: str = "probe_loss") -> pd.DataFrame:
    """run, arm, seed, clock, spent, reached: what each run spent until the target, or in all where it never came."""
    traces = dict(list(frames.steps.groupby(["condition", "arm", "run"], sort=False)))
    rows = []
    for i in frames.runs.index:
        run = frames.runs.loc[i]
        part = Part(frames.runs.loc[[i]], traces[run["condition"], run["arm"], run["run"]])
        for clock in CLOCKS:
            if clock != "steps" and (clock not in part.steps or part.steps[clock].isna().all()):
                continue
            value, spent = measured({"name": f"{clock}_to_target", "target": target, "column": column}, part)
            found = {"clock": clock, "spent": spent, "reached": bool(np.isfinite(value))}
            rows.append(kept(frames.runs, ["run", "arm", "seed"]).loc[i].to_dict() | found)
    return pd.DataFrame(rows)


def draw_spike_events(frames: Frames, scores: list[str] | None = None, title: str = "") -> Drawing:
    """Spike scores by knob (rows) and definition (columns), a panel an arm."""
    frames = with_conditions(frames)
    runs = frames.runs
    columns = [f"{PREFIX}{name}" for name in scores or SCORES if f"{PREFIX}{name}" in runs]
    if not columns:
        raise MuonlabError(
            "these runs have no spike scores; they were kept by an older version, judge them again"
        )
    knobs, arms = list(dict.fromkeys(runs["condition"])), styles(runs["arm"])
    top = float(runs.groupby(["condition", "arm"])[columns].mean().max().max())
    fig, axes = small_multiples(len(arms), 1.25 + 0.17 * len(knobs), sharey=True)
    for place, (ax, (arm, style)) in enumerate(zip(axes, arms.items(), strict=True)):
        plot_spike_events(ax, runs[runs["arm"] == arm], knobs, columns, top, title=style.label)
        if place:
            ax.tick_params(labelleft=False)
    if title:
        fig.suptitle(title)
    note = "Percent of the steps that spike by each definition (OLMo 2: 7 sigma), mean over seeds; †: a seed diverged."
    return fig, kept(runs, [*SETTING, *columns]), note
