"""What each arm spends until a loss is reached, as a ratio to the baseline: steps, tokens, FLOPs, seconds."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from analysis.comparison import Paired, Sample, compare
from analysis.drawing.canvas import COLUMN, Look, new_figure
from analysis.drawing.layout import columns_of, legend_above, with_conditions
from analysis.drawing.palette import styles
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames
from analysis.measures import read_quantity, run_parts

CLOCKS = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}


TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.25, 1.5, 2, 3, 4, 6, 10)


@figure("to_target")
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
    """run, arm, seed, clock, spent, reached: what each run spent until the target, or in all if it never reached it."""
    rows = []
    for part in run_parts(frames, rough=True):
        for clock in CLOCKS:
            if clock != "steps" and (clock not in part.steps or part.steps[clock].isna().all()):
                continue
            quantity = read_quantity({"name": f"{clock}_to_target", "target": target, "column": column})
            value, spent = quantity.value(part)
            row = columns_of(part.runs, ["run", "arm", "seed"]).iloc[0].to_dict()
            rows.append(row | {"clock": clock, "spent": spent, "reached": bool(np.isfinite(value))})
    return pd.DataFrame(rows)


def plot_to_target(ax: Axes, frame: pd.DataFrame, baseline: str, title: str = "") -> None:
    """Ratios of what was spent: a row per clock, a marker at the geometric mean, a bar for its 95 % interval.

    frame: arm, seed, clock (a key of CLOCKS), spent, reached (False: never, and `spent` is the whole run's). A tick is
    a seed; an open triangle to the right is one that never reached the target (its ratio is at least that), to the left
    one whose baseline never did (at most). The mean and its interval are written beside each row. Raises MuonlabError
    where an arm shares no seed with the baseline.
    """
    arms = {arm: style for arm, style in styles(frame["arm"]).items() if arm != baseline}
    clocks = [clock for clock in CLOCKS if clock in set(frame["clock"])]
    places = {}
    for row, clock in enumerate(clocks):
        for rank, arm in enumerate(arms):
            places[clock, arm] = row + (rank - (len(arms) - 1) / 2) * 0.6 / max(len(arms), 2)
    ax.axvline(1, color="#8c8c8c", lw=0.7, zorder=1)
    extremes = [1.0]
    for (clock, arm), place in places.items():
        style, (paired, reached) = arms[arm], _compared(frame[frame["clock"] == clock], arm, baseline)
        mean, ratios = paired.difference.exp(), np.exp(paired.differences)
        low, middle, high = mean.low, mean.estimate, mean.high
        look: Look = {"color": style.colour, "ls": "none", "zorder": 4}
        at = ratios[reached.all(axis=0)]
        ax.plot(at, [place] * len(at), marker="|", ms=6, mew=0.9, gid="seeds", **look)
        for marker, censored in zip("><", ~reached, strict=True):
            if censored.any():
                at = ratios[censored]
                ax.plot(at, [place] * len(at), marker=marker, mfc="white", ms=4.5, gid="censored", **look)
        if np.isfinite(low):
            ax.plot([low, high], [place, place], color=style.colour, lw=2.2, alpha=0.4, zorder=3)
            extremes += [low, high]
        label = style.label if clock == clocks[0] else None
        ax.plot([middle], [place], ms=5, zorder=5, label=label, **style.points)
        text = f"{middle:.2f}" + (f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else "")
        ax.annotate(
            text, (1, place), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", fontsize=6.5, color=style.colour
        )  # fmt: skip
        extremes += list(ratios)
    _finish(ax, clocks, min(extremes) / 1.12, max(extremes) * 1.12)
    ax.set_xlabel(f"spent until the target, over {styles([baseline])[baseline].label}'s")
    ax.set_title(title)


def _compared(frame: pd.DataFrame, arm: str, baseline: str) -> tuple[Paired, np.ndarray]:
    """What was spent, by one clock, as a ratio; and which seeds reached the target: (2, seeds), the arm's first."""
    sides = [frame[frame["arm"] == name].set_index("seed") for name in (arm, baseline)]
    ours, theirs = (Sample.of(side["spent"]) for side in sides)
    paired = compare(ours, theirs, "x", f"the spending of '{arm}' and '{baseline}'")
    return paired, np.array([side.loc[list(paired.seeds), "reached"].astype(bool) for side in sides])


def _finish(ax: Axes, clocks: list[str], low: float, high: float) -> None:
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    inside = [tick for tick in TICKS if low <= tick <= high]
    # Ticks closer than a tenth of the axis would touch; 1 is always labelled.
    ticks = [1.0]
    for tick in sorted(inside, key=lambda value: abs(np.log(value))):
        if all(abs(np.log(tick / other)) > np.log(high / low) / 10 for other in ticks):
            ticks.append(tick)
    ax.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(clocks)), [CLOCKS[clock] for clock in clocks])
    ax.set_ylim(len(clocks) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
