"""Kinds of figures: each file here is one, and registers itself with `@figure`."""

from importlib import import_module
from pkgutil import iter_modules

from analysis.figures.registry import FIGURES, FigureSpec, draw, figure, read_figure

for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")

__all__ = ["FIGURES", "FigureSpec", "draw", "figure", "read_figure"]
