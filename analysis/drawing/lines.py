"""Lines over steps: a thin line per seed, a bold line per arm, a cross where a run diverged."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike

from analysis.drawing.canvas import panel_columns
from analysis.drawing.palette import Style, styles
from muonlab.errors import MuonlabError


def draw_lines(ax: Axes, frame: pd.DataFrame, column: str, window: int = 1) -> None:
    """Draw `column` over `step` for every arm of `frame`, in the frame's order of arms.

    frame: run, arm, status, step and `column`; steps without a reading are left out; where it has `clock`
    (units per step, one value per arm), the horizontal axis is step x clock. window: the centred mean in steps
    that is drawn over the raw trace (alpha 0.2); 1 draws the raw trace alone. Thin lines are seeds, the bold
    line is their median, in which a run that diverged counts as the worst from there on, in up to 120 bins of
    consecutive readings. Raises MuonlabError where the frame lacks a column or holds no finite reading.
    """
    if missing := sorted({"run", "arm", "status", "step", column} - set(frame.columns)):
        raise MuonlabError(f"the frame to draw lacks the columns {', '.join(missing)}")
    if not np.isfinite(frame[column]).any():
        raise MuonlabError(f"there is nothing to draw: no finite '{column}' in {frame['run'].nunique()} runs")
    for order, (arm, style) in enumerate(styles(frame["arm"]).items()):
        _draw_arm(ax, frame[frame["arm"] == arm], column, window, style, zorder=3 + 0.1 * order)


def _draw_arm(ax: Axes, runs: pd.DataFrame, column: str, window: int, style: Style, zorder: float) -> None:
    traces, diverged = {}, 0
    count = runs["run"].nunique()
    clock = clock_of(runs)
    for run, trace in runs.groupby("run", sort=False):
        readings = trace.set_index("step")[column].replace([np.inf, -np.inf], np.nan).dropna()
        smooth = centred_mean(readings, window)
        if window > 1:
            ax.plot(clock * readings.index, readings, color=style.colour, alpha=0.2, lw=0.35, zorder=2)
        if count > 1:
            ax.plot(clock * smooth.index, smooth, color=style.colour, alpha=0.45, lw=0.6, zorder=zorder)
        if trace["status"].iloc[0] == "diverged":
            diverged += 1
            mark_divergence(ax, clock * smooth.index[-1:], smooth.iloc[-1:], style)
            end = smooth.index.max() + 1 if len(smooth) else 0
            smooth = pd.concat([smooth, pd.Series([np.inf], index=[end])])
        traces[run] = smooth
    middle = median_trace(pd.DataFrame(traces))
    label = f"{style.label} (n={count}" + (f", {diverged} diverged)" if diverged else ")")
    middle = binned(middle)
    ax.plot(clock * middle.index, middle, color=style.colour, ls=style.dash, label=label, zorder=zorder + 2)


def binned(trace: pd.Series, bins: int = 120) -> pd.Series:
    """The median of each of at most `bins` runs of consecutive readings, at its middle: a dashed line that
    followed every wiggle of a noisy trace would look solid."""
    width = -(-len(trace) // bins)
    if width < 2:
        return trace
    parts = trace.groupby(np.arange(len(trace)) // width)
    middle = trace.index.to_series().groupby(np.arange(len(trace)) // width).median()
    return pd.Series(parts.median().to_numpy(), index=middle.to_numpy())


def clock_of(runs: pd.DataFrame) -> float:
    """What a step counts on the horizontal axis: `clock` where the frame has it, else 1."""
    return float(runs["clock"].iloc[0]) if "clock" in runs else 1


def median_trace(traces: pd.DataFrame) -> pd.Series:
    """The median over runs (columns) at every step (index) where it is finite.

    A trace that ends in infinity stays there, so that a run which diverged weighs as the worst; one that
    merely stops is left out of later steps. Gaps within a trace are bridged in a straight line.
    """
    bridged = traces.sort_index()
    endless = bridged.isin([np.inf])
    finite = bridged.mask(endless).interpolate(method="index", limit_area="inside")
    return finite.mask(endless.cummax(), np.inf).median(axis=1).replace(np.inf, np.nan).dropna()


def centred_mean(readings: pd.Series, window: int) -> pd.Series:
    """The mean of the readings in the `window` steps (the index) around each one, itself in the middle.

    Near the ends of the trace the window shrinks on both sides alike, so that a straight line is unchanged: a mean of
    past readings only would lie above a falling loss.
    """
    if window == 1 or len(readings) < 2:
        return readings.copy()
    steps = readings.index.to_numpy()
    reach = np.minimum((window - 1) / 2, np.minimum(steps - steps[0], steps[-1] - steps))
    first = np.searchsorted(steps, steps - reach, side="left")
    last = np.searchsorted(steps, steps + reach, side="right")
    total = np.concatenate([[0.0], np.cumsum(readings.to_numpy(float))])
    return pd.Series((total[last] - total[first]) / (last - first), index=readings.index)


def mark_divergence(ax: Axes, x: ArrayLike, y: ArrayLike, style: Style) -> None:
    """A cross in the arm's colour, edged in white so that it stands out from the arm's own line."""
    ax.plot(
        x, y, "X", color=style.colour, mec="white", mew=0.5, ms=5.5, clip_on=False, zorder=8, gid="diverged"
    )


def set_steps_axis(ax: Axes, frame: pd.DataFrame) -> None:
    """Limits and label of a horizontal axis in optimizer steps, with the tokens of a step where they are
    known and there is room; or in units of 1 / (learning rate x weight decay) where the frame has a clock."""
    if "clock" in frame:
        ax.set_xlim(0, (frame["clock"] * (frame["step"] + 1)).max())
        ax.set_xlabel("step x learning rate x weight decay")
        return
    ax.set_xlim(0, frame["step"].max() + 1)
    bins = 8 if panel_columns(ax) < 3 else 5
    ax.xaxis.set_major_locator(MaxNLocator(nbins=bins, steps=[1, 2, 2.5, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    label = "optimizer step"
    narrow = panel_columns(ax) > 3
    if not narrow and "tokens" in frame and frame["tokens"].notna().any():
        per_step = (frame["tokens"] / (frame["step"] + 1)).median()
        label += f" ({per_step:,.0f} tokens each)"
    ax.set_xlabel(label)


def set_log_axis(axis: Axis, low: float, high: float, narrow: bool = False) -> None:
    """Label a logarithmic axis with 30 or 1,000 rather than powers, up to a million.

    The fewer decades, the more ticks in each; narrow: fewer, for a horizontal axis of a quarter page.
    """
    ratio = high / low
    if ratio < (6.3 if narrow else 4):  # below that, ticks at 1, 2 and 5 could leave one alone
        axis.set_major_locator(MaxNLocator(nbins=3 if narrow else 5, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    else:
        subs: tuple[int, ...] = (1, 3) if ratio < (200 if narrow else 2000) else (1,)
        if ratio < 40:
            subs = (1, 2, 5) if narrow or ratio > 10 else (1, 2, 3, 5, 7)
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short_number(value)))
    axis.set_minor_formatter(NullFormatter())


def draw_rate_axis(ax: Axes, frame: pd.DataFrame) -> None:
    """A second axis above, of the learning rate at each step, for runs whose schedule only grows and is the same."""
    rates = frame.groupby("step")["scheduled_lr"].median().dropna()
    decades = range(math.floor(math.log10(rates.iloc[0])), math.ceil(math.log10(rates.iloc[-1])) + 1)
    wanted = [k * 10.0**n for n in decades for k in (1, 3) if rates.iloc[0] <= k * 10.0**n <= rates.iloc[-1]]
    places = np.interp(np.log(wanted), np.log(rates), rates.index)
    # A warm-up crosses several at once: of those that would touch, the last stays.
    spaced = np.diff(places, append=np.inf) > 0.08 * rates.index.max()
    above = ax.secondary_xaxis("top")
    above.set_xticks(
        places[spaced], [f"{rate:g}" for rate, visible in zip(wanted, spaced, strict=True) if visible]
    )
    above.set_xlabel("learning rate")


def hide_steps_labels(ax: Axes) -> None:
    """For a panel above another that has the same steps axis."""
    ax.set_xlabel("")
    ax.tick_params(labelbottom=False)


def _short_number(value: float) -> str:
    if value >= 1e6:
        return f"$10^{{{round(math.log10(value))}}}$" if math.log10(value) % 1 < 1e-9 else f"{value:.0e}"
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"
