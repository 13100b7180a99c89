"""Lines over steps: one thin line a seed, one bold line an arm, a cross where a run diverged."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.palette import Style, styles
from muonlab.errors import MuonlabError


def draw_traces(ax: Axes, frame: pd.DataFrame, column: str, window: int = 1) -> None:
    """Draw `column` over `step` for every arm of `frame`, in the frame's order of arms.

    frame: run, arm, seed, status, step and `column`; steps without a reading are left out. window: the
    trailing mean in readings that is drawn over the raw trace (alpha 0.2); 1 draws the raw trace alone. Thin
    lines are seeds, the bold line is the median over seeds, in which a run that diverged counts as the worst
    from there on. Raises MuonlabError where the frame lacks a column or holds no reading.
    """
    required = {"run", "arm", "seed", "status", "step", column}
    if missing := sorted(required - set(frame.columns)):
        raise MuonlabError(f"the frame to draw lacks the columns {', '.join(missing)}")
    frame = frame[frame[column].notna() | (frame["status"] == "diverged")]
    if not np.isfinite(frame[column]).any():
        raise MuonlabError(f"there is nothing to draw: no finite '{column}' in {frame['run'].nunique()} runs")
    for order, (arm, style) in enumerate(styles(frame["arm"]).items()):
        _draw_arm(ax, frame[frame["arm"] == arm], column, window, style, zorder=3 + 0.1 * order)


def _draw_arm(ax: Axes, runs: pd.DataFrame, column: str, window: int, style: Style, zorder: float) -> None:
    smoothed, last, diverged = {}, int(runs["step"].max()), 0
    count = runs["run"].nunique()
    for run, trace in runs.groupby("run", sort=False):
        readings = trace.set_index("step")[column].replace([np.inf, -np.inf], np.nan).dropna()
        drawn = trailing_mean(readings, window)
        if window > 1:
            ax.plot(
                readings.index,
                readings,
                color=style.colour,
                alpha=0.2 if count < 4 else 0.1,
                lw=0.4,
                zorder=2,
            )
        if count > 1:
            ax.plot(drawn.index, drawn, color=style.colour, alpha=0.45, lw=0.6, zorder=zorder)
        if trace["status"].iloc[0] == "diverged":
            diverged += 1
            if len(drawn):
                ax.plot(drawn.index[-1:], drawn.iloc[-1:], "x", color=style.colour, ms=4.5, mew=1.2, zorder=6)
            drawn = (
                pd.concat([drawn, pd.Series({last: np.inf})])
                if not len(drawn) or drawn.index[-1] < last
                else drawn
            )
        smoothed[run] = drawn
    middle = pd.DataFrame(smoothed).ffill().median(axis=1).replace(np.inf, np.nan).dropna()
    label = f"{style.label} (n={count}" + (f", {diverged} diverged)" if diverged else ")")
    ax.plot(middle.index, middle, color=style.colour, ls=style.dash, label=label, zorder=zorder + 2)


def trailing_mean(readings: pd.Series, window: int) -> pd.Series:
    """The mean of the last `window` readings up to each one, of fewer at the start."""
    return readings if window == 1 else readings.rolling(window, min_periods=1).mean()


def set_steps_axis(ax: Axes, frame: pd.DataFrame) -> None:
    """Limits and label of a horizontal axis in optimizer steps, with the tokens of a step where they are
    known."""
    ax.set_xlim(0, max(1, frame["step"].max()))
    label = "optimizer step"
    if "tokens" in frame and frame["tokens"].notna().any():
        per_step = (frame["tokens"] / (frame["step"] + 1)).median()
        label += f" ({per_step:,.0f} tokens each)"
    ax.set_xlabel(label)


def set_log_axis(axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis that say 30 or 1,000, not powers, with as many as fit the decades
    spanned."""
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 3) if decades < 3 else (1,), numticks=12))
    axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
