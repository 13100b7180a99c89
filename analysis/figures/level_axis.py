"""A horizontal axis of the levels that a sweep tried, whether they are numbers or names."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
from matplotlib.axes import Axes

SYMBOLS = {"tau": "τ", "kappa": "κ"}


@dataclass(frozen=True)
class LevelAxis:
    """Where each level stands: its place in axis units (decades on a logarithmic axis) and its tick's text.

    joined: the levels that a line may join, which are numbers in their order; names stand apart.
    """

    places: dict[str, float]
    joined: frozenset[str]

    def place(self, levels: pd.Series) -> pd.Series:
        """The place of every level."""
        return levels.map(level_text).map(self.places)

    def joins(self, levels: pd.Series) -> pd.Series:
        """Which of the levels are numbers on the axis."""
        return levels.map(level_text).isin(self.joined)

    @property
    def dodge(self) -> float:
        """How far arms stand beside each other at one level: little, against the axis and against its steps."""
        ordered = sorted(set(self.places.values()))
        return min([0.08 * (b - a) for a, b in pairwise(ordered)] + [0.012 * (ordered[-1] - ordered[0])])

    def draw(self, ax: Axes, label: str) -> None:
        """Ticks at the levels, their texts slanted where they would touch, and limits a little beyond the outermost."""
        ordered = sorted(self.places.items(), key=lambda item: item[1])
        low, high = ordered[0][1], ordered[-1][1]
        margin = 0.06 * (high - low) or 0.5
        ax.set_xlim(low - margin, high + margin)
        ax.set_xticks([place for _, place in ordered], [text for text, _ in ordered])
        # Points between neighbours, in panels that lose half an inch to labels; letters are 3.7 points wide.
        width = 72 * (ax.get_figure().get_size_inches()[0] / ax.get_gridspec().ncols - 0.5)
        scale = width / (high - low + 2 * margin)
        if any(
            scale * (b - a) < 3.7 * (len(left) + len(right)) / 2 + 3
            for (left, a), (right, b) in pairwise(ordered)
        ):
            ax.tick_params(axis="x", labelrotation=45)
            for text in ax.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
        ax.set_xlabel(SYMBOLS.get(label, label))


def level_axis(levels: pd.Series, log: bool = True) -> LevelAxis:
    """Lay out the levels that occur.

    Numbers stand at their decimal logarithm (`log`) or their value; zero and less, which have no logarithm, one step to
    the left, and names ("none") in their order one step each to the right of the numbers.
    """
    texts = list(dict.fromkeys(levels.map(level_text)))
    numbers = {text: float(text.replace(",", "")) for text in texts if _is_number(text)}
    drawn = {text: value for text, value in numbers.items() if value > 0 or not log}
    places = {text: math.log10(value) if log else value for text, value in drawn.items()}
    step = max(_mean_gap(places.values()), 1e-9)
    left = sorted((value, text) for text, value in numbers.items() if text not in drawn)
    for rank, (_, text) in enumerate(reversed(left), start=1):
        places[text] = min((places[t] for t in drawn), default=0) - rank * step
    for rank, text in enumerate((t for t in texts if t not in numbers), start=1):
        places[text] = max((places[t] for t in drawn), default=-1) + rank * step
    return LevelAxis(places, frozenset(numbers))


def level_text(level: float | str) -> str:
    """A level as a tick says it: 0.003, 1,000 or its name."""
    if isinstance(level, str) and not _is_number(level):
        return level.replace("_", " ")
    value = float(level)
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:g}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(str(text).replace(",", "")))
    except ValueError:
        return False


def _mean_gap(places) -> float:
    ordered = sorted(places)
    return (ordered[-1] - ordered[0]) / (len(ordered) - 1) if len(ordered) > 1 else 1.0
