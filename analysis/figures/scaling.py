"""Loss over compute, the power laws through it, and how much compute one optimizer saves."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from analysis.columns import axis_label
from analysis.drawing.canvas import Look, new_figure
from analysis.drawing.layout import SETTING, columns_of, legend_above
from analysis.drawing.palette import styles
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames
from analysis.inference import CONFIDENCE
from analysis.measures.scaling import PowerLaw, bootstrap_ratio, fit_lines, fit_power_law, resampled_means
from muonlab.errors import MuonlabError

RESAMPLES = 2000


Points = tuple[np.ndarray, np.ndarray]  # compute by size (sizes,) and losses (sizes, seeds)


@figure("scaling")
def draw_scaling(
    frames: Frames, arm: str = "muon", baseline: str = "adamw", metric: str = "loss", title: str = ""
) -> Drawing:
    """Loss over compute with power laws, their bootstrap bands and the saving."""
    fig, axes = new_figure(1, 1, height=2.6)
    plot_scaling(axes[0, 0], frames.runs, arm, baseline, metric, title)
    legend_above(fig, list(axes.flat))
    note = (
        "Power laws through the means over seeds; bands and brackets hold 95% of the laws of resampled seeds."
    )
    return fig, columns_of(frames.runs, [*SETTING, "flops", metric]), note


def plot_scaling(
    ax: Axes, frame: pd.DataFrame, arm: str, baseline: str, metric: str = "loss", title: str = ""
) -> None:
    """Loss over training FLOPs on two logarithmic axes: a marker per run, a power law per arm, its bootstrap band.

    frame: `Frames.runs` (arm, seed, level, flops and `metric`), every arm at the same sizes. The law goes through the
    means over seeds; the band holds 95 % of the laws of seeds drawn anew at each size. The arrow lies at the baseline's
    loss at its largest compute and ends where `arm` has that loss: its text is the ratio of compute with its interval
    (Moonlight, arXiv 2502.16982, Fig 1a). Raises MuonlabError for arms without runs or with one size.
    """
    points = {name: _points(frame, name, metric) for name in dict.fromkeys([*frame["arm"], arm, baseline])}
    for name, style in styles(points).items():
        compute, losses = points[name]
        law = fit_power_law(compute, losses.mean(axis=1))
        x = _rounded(np.geomspace(compute[0] / 1.15, compute[-1] * 1.15, 60))
        y, (low, high) = _rounded(law.loss(x)), _band(compute, losses, x)
        label = f"{style.label}: {_power(law)}"
        ax.plot(x, y, color=style.colour, ls=style.dash, lw=1.1, zorder=3, label=label)
        ax.fill_between(x, low, high, color=style.colour, alpha=0.15, lw=0, zorder=1.5)
        ax.plot(
            np.repeat(compute, losses.shape[1]), losses.ravel(), zorder=4, gid="runs", **style.points
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    _draw_saving(ax, styles([arm])[arm].label, points[arm], points[baseline])
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("training compute (FLOPs)")
    ax.set_ylabel(axis_label(metric))
    ax.set_title(title)


def _points(frame: pd.DataFrame, arm: str, metric: str) -> Points:
    """Compute by size (sizes,), ascending, and losses (sizes, seeds) over the seeds that every size has."""
    runs = frame[(frame["arm"] == arm) & frame[metric].notna()]
    if runs.empty:
        raise MuonlabError(f"there is no finished run of '{arm}'; arms: {', '.join(frame['arm'].unique())}")
    table = runs.pivot_table(index="level", columns="seed", values=metric).dropna(axis="columns")
    compute = runs.groupby("level")["flops"].mean().reindex(table.index)
    order = np.argsort(compute.to_numpy())
    return compute.to_numpy()[order], table.to_numpy()[order]


def _band(compute: np.ndarray, losses: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means = resampled_means(losses, RESAMPLES, np.random.default_rng(0))
    slopes, intercepts = fit_lines(np.log(compute), np.log(means))
    values = np.exp(intercepts[:, None] + slopes[:, None] * np.log(x))
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return _rounded(low), _rounded(high)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Nine significant digits: CPUs differ in the last ones of a logarithm, and a figure is the same bytes on all."""
    return np.array([float(f"{value:.9g}") for value in values])


def _draw_saving(ax: Axes, name: str, arm: Points, baseline: Points) -> None:
    compute, losses = baseline
    at = compute[-1]
    laws = [fit_power_law(c, values.mean(axis=1)) for c, values in (arm, baseline)]
    level = laws[1].loss(at)
    shared = min(arm[1].shape[1], losses.shape[1])
    interval = bootstrap_ratio(arm[1][:, :shared], losses[:, :shared], compute, at, RESAMPLES)
    end = laws[0].compute(level)
    line = {
        "arrowstyle": "-|>",
        "lw": 0.8,
        "color": "#262626",
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 7,
    }
    ax.annotate("", (end, level), (at, level), arrowprops=line, zorder=5)
    text = f"{name} needs {interval.estimate:.2f} of the compute\n[{interval.low:.2f}, {interval.high:.2f}]"
    words: Look = {"ha": "right", "va": "top", "fontsize": 6.5, "color": "#262626", "gid": "saving"}
    ax.text(0.99, 0.99, text, transform=ax.transAxes, **words)


def _power(law: PowerLaw) -> str:
    return f"{law.coefficient:.3g} $C^{{-{law.exponent:.3f}}}$"
