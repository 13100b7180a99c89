"""Figures at printed size in the project's style, without pyplot's global state."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

COLUMN, PAGE = 3.4, 6.9  # inches: one column, the whole page
STYLE_SHEET = Path(__file__).with_name("style.mplstyle")

Look = dict[str, Any]
"""Keyword arguments that several drawing calls share."""

# The sheet lies on matplotlib's own defaults, so that a user's matplotlibrc cannot change a figure.
_SHEET = matplotlib.rc_params_from_file(STYLE_SHEET, fail_on_error=True, use_default_template=True)
_SETTINGS = {name: value for name, value in _SHEET.items() if not name.startswith("backend")}


@contextmanager
def style() -> Iterator[None]:
    """Everything drawn inside has the style sheet's look, whatever the user's own settings are."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(
    rows: int = 1, columns: int = 1, width: float = COLUMN, height: float = 2.3, **panels: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of `width` x `height` inches and its axes, an array (rows, columns).

    `panels` goes to `Figure.subplots`: sharex, sharey, height_ratios, ... Captions are added below by
    `save_figure`, which makes the figure taller by what they need.
    """
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False, **panels)


def panel_place(ax: Axes) -> SubplotSpec:
    """Where a panel of `new_figure` lies in its figure's grid."""
    place = ax.get_subplotspec()
    assert place is not None, "the axes were not made by new_figure"
    return place


def panel_columns(ax: Axes) -> int:
    """How many panels lie side by side in the figure of `ax`."""
    return panel_place(ax).get_gridspec().ncols
