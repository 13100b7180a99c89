"""A horizontal axis of the levels that a sweep tried, whether they are numbers or names."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.drawing.canvas import panel_columns

SYMBOLS = {"tau": "τ", "kappa": "κ"}
MARGIN = 0.06  # of the axis beyond the outermost levels, as a share of their range
DIGITS = 3  # significant digits of a level that somebody chose; a sampler's have more, and get no ticks


@dataclass(frozen=True)
class LevelAxis:
    """Where each level is drawn: its place in axis units (decades on a logarithmic axis) and its tick's text.

    joined: the levels that a line may connect: numbers, in their order, and never names.
    sampled: a sampler drew the levels, so that the ticks are decades and not the levels themselves.
    """

    places: dict[str, float]
    joined: frozenset[str]
    sampled: bool = False

    def place(self, levels: pd.Series) -> pd.Series:
        """The place of every level."""
        return levels.map(level_text).map(self.places)

    def joins(self, levels: pd.Series) -> pd.Series:
        """Which of the levels are numbers on the axis."""
        return levels.map(level_text).isin(self.joined)

    def dodge(self, arms: int) -> float:
        """How far so many arms are drawn beside each other at one level: little, against the axis and its steps, and
        together within its margins."""
        ordered = sorted(set(self.places.values()))
        share = min(0.012, 2 * 0.8 * MARGIN / max(1, arms - 1))
        return min([0.08 * (b - a) for a, b in pairwise(ordered)] + [share * (ordered[-1] - ordered[0])])

    def draw(self, ax: Axes, label: str) -> None:
        """Ticks at the levels, their texts slanted where they would touch, and limits a little beyond the outermost."""
        ax.set_xlabel(SYMBOLS.get(label, label))
        ordered = sorted(self.places.items(), key=lambda item: item[1])
        low, high = ordered[0][1], ordered[-1][1]
        margin = MARGIN * (high - low) or 0.5
        ax.set_xlim(low - margin, high + margin)
        if self.sampled:
            _draw_decades(ax, low - margin, high + margin)
            return
        ax.set_xticks([place for _, place in ordered], [text for text, _ in ordered])
        # Points between neighbours, in panels that lose half an inch to labels; letters are 3.7 points wide.
        width = 72 * (ax.figure.get_figure(root=True).get_size_inches()[0] / panel_columns(ax) - 0.5)
        scale = width / (high - low + 2 * margin)
        if any(
            scale * (b - a) < 3.7 * (len(left) + len(right)) / 2 + 3
            for (left, a), (right, b) in pairwise(ordered)
        ):
            ax.tick_params(axis="x", labelrotation=45)
            for text in ax.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")


def level_axis(levels: pd.Series, log: bool = True) -> LevelAxis:
    """Lay out the levels that occur.

    Numbers are placed at their decimal logarithm (`log`) or their value; zero and less, which have no logarithm, one
    step to the left, and names ("none") in their order one step each to the right of the numbers. Where all have a
    logarithm and some have more digits than anybody would choose, a sampler drew them.
    """
    texts = list(dict.fromkeys(levels.map(level_text)))
    numbers = {text: float(text.replace(",", "")) for text in texts if _is_number(text)}
    placed = {text: value for text, value in numbers.items() if value > 0 or not log}
    places = {text: math.log10(value) if log else value for text, value in placed.items()}
    step = max(_mean_gap(places.values()), 1e-9)
    left = sorted((value, text) for text, value in numbers.items() if text not in placed)
    for rank, (_, text) in enumerate(reversed(left), start=1):
        places[text] = min((places[t] for t in placed), default=0) - rank * step
    for rank, text in enumerate((t for t in texts if t not in numbers), start=1):
        places[text] = max((places[t] for t in placed), default=-1) + rank * step
    sampled = any(float(f"{value:.{DIGITS}g}") != value for value in numbers.values() if value < 1000)
    return LevelAxis(places, frozenset(numbers), log and len(placed) == len(texts) and sampled)


def level_text(level: float | str, digits: int = 6) -> str:
    """The text of a level's tick: 0.003, 1,000 or its name; digits: significant ones of a number below 1,000."""
    if isinstance(level, str) and not _is_number(level):
        return level.replace("_", " ")
    value = float(level)
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.{digits}g}"


def _draw_decades(ax: Axes, low: float, high: float) -> None:
    """Labelled ticks at powers of ten, unlabelled ones between; within one decade at 1, 2 and 5, or at round values.

    low, high: the axis' limits, as decimal logarithms.
    """

    def inside(factors: Iterable[int]) -> list[float]:
        decades = range(math.floor(low), math.ceil(high) + 1)
        return [k * 10.0**n for n in decades for k in factors if low <= math.log10(k) + n <= high]

    ends = 10**low, 10**high
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(*ends)
    rounded = [value for value in ticks if ends[0] <= value <= ends[1]]
    choices = inside((1,)), inside((1, 2, 5)), rounded
    labelled = next((ticks for ticks in choices if len(ticks) > 1), rounded)
    ax.set_xticks([math.log10(value) for value in labelled], [_scientific(value) for value in labelled])
    between = [value for value in inside(range(1, 10)) if value not in labelled]
    ax.set_xticks([math.log10(value) for value in between], minor=True)


def _scientific(value: float) -> str:
    """ "1e-3", "2.5e-2"."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(str(text).replace(",", "")))
    except ValueError:
        return False


def _mean_gap(places: Iterable[float]) -> float:
    ordered = sorted(places)
    return (ordered[-1] - ordered[0]) / (len(ordered) - 1) if len(ordered) > 1 else 1.0
