"""A whole figure as an experiment's file asks for it: chosen runs, drawn by its kind, with a caption, on disk."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.archive import choose
from analysis.canvas import style
from analysis.frames import Frames
from analysis.layouts import comparisons, sweeps, traces
from analysis.layouts.drawing import Drawing
from analysis.save import save_figure
from muonlab.errors import MuonlabError, unknown_name

KINDS: dict[str, Callable[..., Drawing]] = {
    "traces": traces.draw_traces,
    "spike_vs_stable": traces.draw_spike_vs_stable,
    "switch": traces.draw_switch,
    "crossing": traces.draw_crossing,
    "rise_and_fall": traces.draw_rise_and_fall,
    "spectra": traces.draw_spectra,
    "balance": traces.draw_balance,
    "mechanism": traces.draw_mechanism,
    "heads": traces.draw_heads,
    "levels": sweeps.draw_levels,
    "lr_sensitivity": sweeps.draw_lr_sensitivity,
    "scaling": sweeps.draw_scaling,
    "extrapolation": sweeps.draw_extrapolation,
    "polynomials": sweeps.draw_polynomials,
    "arms": comparisons.draw_arms,
    "to_target": comparisons.draw_to_target,
    "spike_events": comparisons.draw_spike_events,
}
SHARED = ("name", "kind", "about", "conditions", "arms")


def check_figure(spec: Mapping[str, Any]) -> None:
    """Raises MuonlabError, naming what is near, for an unknown kind, an unknown setting or a missing one."""
    for key in ("name", "kind"):
        if key not in spec:
            raise MuonlabError(f"a figure needs '{key}', and {dict(spec)} has none")
    kind = spec["kind"]
    if kind not in KINDS:
        raise unknown_name("kind of figure", kind, KINDS)
    parameters = dict(list(inspect.signature(KINDS[kind]).parameters.items())[1:])
    for key in spec:
        if key not in (*SHARED, "table", *parameters):
            raise unknown_name(f"setting of figure {spec['name']} ({kind})", key, [*SHARED, *parameters])
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in spec:
            raise MuonlabError(f"the figure {spec['name']} ({kind}) needs '{key}'")


def draw(spec: Mapping[str, Any], data: Frames | pd.DataFrame, folder: Path, made_by: str) -> dict[str, Path]:
    """Draw and save one figure.

    spec: `name` (of the files), `kind` (one of KINDS), `conditions` and `arms` (which runs; none: all), `about` (the
    caption's first sentence), and the kind's own settings. data: runs, or the table of a figure that shows none.
    made_by: the command and commit, the caption's last. Returns the paths by file type. Raises MuonlabError as
    `check_figure` does, and where there is nothing to draw.
    """
    check_figure(spec)
    settings = dict(spec)
    name, kind = settings.pop("name"), settings.pop("kind")
    about, sample = settings.pop("about", ""), ""
    if isinstance(data, Frames):
        data = choose(data, settings.pop("conditions", ()), settings.pop("arms", ()))
        sample = describe_sample(data.runs)
    with style():
        fig, table, note = KINDS[kind](data, **settings)
    caption = " ".join(f"{about} {note} {sample} {made_by}".split())
    return save_figure(fig, folder, name, table, caption=caption)


def describe_sample(runs: pd.DataFrame) -> str:
    """What the numbers rest on: "9 runs, n=3 seeds each; 716,800 tokens a run."."""
    setting = [c for c in ("condition", "arm", "level", "lr") if c in runs]
    seeds = runs.groupby(setting, dropna=False)["seed"].nunique()
    count = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    plural = "seed" if seeds.max() == 1 else "seeds"
    tokens = sorted({int(t) for t in runs.loc[runs["status"] != "diverged", "tokens"].dropna()})
    tokens = tokens or sorted({int(t) for t in runs["tokens"].dropna()})
    diverged = int((runs["status"] == "diverged").sum())
    lost = f", {diverged} diverged" if diverged else ""
    spent = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    return f"{len(runs)} runs, n={count} {plural} each{lost}; {spent} tokens a run."
