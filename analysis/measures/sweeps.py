"""Measures over the levels of one seed: sensitivity, optimum, slope, bowl. Each takes values by level, lowest first."""

import math

import numpy as np
import pandas as pd

from analysis.measures.registry import measure
from muonlab.errors import MuonlabError

FEWEST = 3  # levels for a fit


@measure("sweep", "of", "Wortsman et al. (arXiv 2309.14322), section 2")
def lr_sensitivity(values: pd.Series) -> float:
    """E_lr[min(loss, loss0) - loss*] over the rates tried, loss* the best of them.

    The column `loss` is min(loss, loss0) already. The measure depends on the range: centre every arm's on its own
    optimum, or give all the same.
    """
    return float(values.mean() - values.min())


@measure("sweep", "of", "muonlab", picks=True)
def best(values: pd.Series) -> float:
    """The lowest value of all levels."""
    return float(values.min())


@measure("sweep", "", "muonlab", picks=True)
def best_level(values: pd.Series) -> float:
    """The level with the lowest value: judge it `as: ratio`, since levels are spaced by factors."""
    _numeric(values)
    return float(values.index.to_numpy(float)[values.argmin()]) if values.notna().any() else math.nan


@measure("sweep", "", "muonlab")
def slope(values: pd.Series, log: bool = True) -> float:
    """Least-squares slope over the natural logarithm of the level: of the value's logarithm (the exponent of a power
    law), or with `log: false` of the value itself. Infinite values are left out; NaN with fewer than three others."""
    _numeric(values)
    inside = values[np.isfinite(values) & ((values > 0) | (not log))]
    if len(inside) < FEWEST:
        return math.nan
    from scipy import stats

    return float(stats.linregress(np.log(inside.index), np.log(inside) if log else inside).slope)


@measure("sweep", "of", "muonlab: is a minimum inside its range?")
def bowl_depth(values: pd.Series) -> float:
    """The lower of the two ends minus the minimum: 0 where the minimum is an end, above where it lies inside."""
    _numeric(values)
    return float(min(values.iloc[0], values.iloc[-1]) - values.min())


@measure("sweep", "of", "muonlab")
def contrast(values: pd.Series, high: float | str, low: float | str) -> float:
    """The value at level `high` minus the value at level `low`, of the same seed."""
    return _at(values, high) - _at(values, low)


@measure("sweep", "x", "muonlab")
def ratio(values: pd.Series, high: float | str, low: float | str) -> float:
    """The value at level `high` over the value at level `low`, of the same seed."""
    return _at(values, high) / _at(values, low)


@measure("sweep", "of", "muonlab: is it flat?")
def spread(values: pd.Series, above: float = -math.inf, below: float = math.inf) -> float:
    """Largest minus smallest value of the levels from `above` to `below`, both included."""
    inside = values[(values.index >= above) & (values.index <= below)] if len(values) else values
    return float(inside.max() - inside.min())


@measure("sweep", "", "muonlab: is it monotone?")
def rank_correlation(values: pd.Series) -> float:
    """Spearman's correlation of value and level: 1 where every higher level has a higher value."""
    _numeric(values)
    from scipy import stats

    return float(stats.spearmanr(values.index, values).statistic)


@measure("sweep", "x", "Wortsman et al. (arXiv 2309.14322), Fig 9")
def extrapolation_factor(values: pd.Series, degree: int = 2) -> float:
    """How far the highest level's value lies from its prediction by the others: exp(|log predicted - log measured|).

    The prediction is a polynomial of `degree` in the logarithm of the level, fitted by least squares to the logarithm
    of the value; 2 is hit within a factor of two. NaN with fewer levels than the fit has coefficients.
    """
    _numeric(values)
    known, last = values.iloc[:-1], values.iloc[-1]
    if len(known) < degree + 1 or not (values > 0).all() or not np.isfinite(values).all():
        return math.nan
    fit = np.polynomial.Polynomial.fit(np.log(known.index), np.log(known), degree)
    return math.exp(abs(fit(math.log(values.index[-1])) - math.log(last)))


def _at(values: pd.Series, level: float | str) -> float:
    same = [value for key, value in zip(values.index.tolist(), values, strict=True) if _same(key, level)]
    if not same:
        raise MuonlabError(f"there is no level {level}; levels: {', '.join(map(str, values.index))}")
    return float(same[0])


def _same(key: float | str, level: float | str) -> bool:
    if isinstance(key, str) or isinstance(level, str):
        return str(key) == str(level)
    return math.isclose(key, level, rel_tol=1e-9)


def _numeric(values: pd.Series) -> None:
    if not pd.api.types.is_numeric_dtype(values.index):
        raise MuonlabError(
            f"the levels {', '.join(map(str, values.index))} are not numbers, so they cannot be ordered or fitted"
        )
