"""Search spaces in Hydra's override syntax, as Optuna distributions and as images of points of the unit cube."""

import math
from collections.abc import Mapping

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, QuotedString, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from muonlab.errors import MuonlabError
from muonlab.settings.check import vanishing_number
from muonlab.settings.search import Setting

ALLOWED = "allowed are interval(a, b), tag(log, interval(a, b)), choice(a, b, ...) and range(a, b, step)"


def parse_space(space: Mapping[str, str]) -> dict[str, BaseDistribution]:
    """{"lr": "tag(log, interval(3e-4, 3e-2))"} -> {"lr": FloatDistribution(log=True, ...)}.

    interval(a, b) is a real number (`tag(log, ...)`: uniform in its logarithm; int(interval(...)): an integer),
    choice(a, b) one of the values, range(a, b, step) an integer. Raises MuonlabError for anything else.
    """
    return {name: _distribution(name, text) for name, text in space.items()}


def _distribution(name: str, text: str) -> BaseDistribution:
    if number := vanishing_number(text):
        raise MuonlabError(f"search space of {name}: {number} in '{text}' is too small for a number")
    try:
        sweep = OverridesParser.create().parse_override(f"{name}={text}").value()
    except HydraException as error:
        raise MuonlabError(f"search space of {name}: '{text}' cannot be parsed; {ALLOWED}") from error
    if isinstance(sweep, IntervalSweep):
        return _interval(name, text, sweep)
    if isinstance(sweep, ChoiceSweep):
        return CategoricalDistribution([v.text if isinstance(v, QuotedString) else v for v in sweep.list])  # type: ignore[misc]
    if isinstance(sweep, RangeSweep):
        return _range(name, text, sweep)
    raise MuonlabError(f"search space of {name}: '{text}' is a single value; {ALLOWED}")


def _interval(name: str, text: str, sweep: IntervalSweep) -> BaseDistribution:
    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        raise MuonlabError(f"search space of {name}: the ends of '{text}' are not finite")
    if not low < high or (log and low <= 0):
        raise MuonlabError(f"search space of {name}: '{text}' is empty" + (" on a log scale" if log else ""))
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _range(name: str, text: str, sweep: RangeSweep) -> BaseDistribution:
    low, stop, step = sweep.start, sweep.stop, sweep.step
    if not (isinstance(low, int) and isinstance(stop, int) and isinstance(step, int)):
        raise MuonlabError(f"search space of {name}: '{text}' needs integers; {ALLOWED}")
    if step < 1 or stop <= low:
        raise MuonlabError(f"search space of {name}: '{text}' is empty; {ALLOWED}")
    return IntDistribution(low, low + step * ((stop - 1 - low) // step), step=step)


def at(distribution: BaseDistribution, u: float) -> object:
    """The value of a distribution at the quantile u in [0, 1).

    Log scale: low (high / low)^u. Integers and choices: equal shares of [0, 1).
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(u * len(distribution.choices))]
    if isinstance(distribution, IntDistribution):
        low, high = distribution.low, distribution.high
        if distribution.log:
            return min(high, int(math.exp(math.log(low) + u * (math.log(high + 1) - math.log(low)))))
        return low + distribution.step * int(u * ((high - low) // distribution.step + 1))
    assert isinstance(distribution, FloatDistribution)
    start, end = distribution.low, distribution.high
    return start * (end / start) ** u if distribution.log else start + u * (end - start)


def quasi_random(distributions: Mapping[str, BaseDistribution], count: int, seed: int) -> list[Setting]:
    """`count` settings at the points of a scrambled Halton sequence; a larger count begins with the same ones.

    Every optimizer whose space has as many dimensions gets identical points of the unit cube, so no optimizer benefits
    from luckier draws.
    """
    from scipy.stats import qmc

    points = qmc.Halton(len(distributions), scramble=True, rng=seed).random(count).tolist()
    return [{n: at(d, u) for (n, d), u in zip(distributions.items(), p, strict=True)} for p in points]


def extremes(distribution: BaseDistribution) -> list[object]:
    """The two ends of a range, or all choices."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def containing(distribution: BaseDistribution, value: object) -> BaseDistribution:
    """The distribution, widened to hold `value`: a published setting may lie outside the searched range.

    Raises MuonlabError for a value that no such distribution can hold.
    """
    if isinstance(distribution, CategoricalDistribution):
        known = value in distribution.choices
        return distribution if known else CategoricalDistribution([*distribution.choices, value])  # type: ignore[list-item]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MuonlabError(
            f"a published setting must be a finite number like the searched ones, not {value!r}"
        )
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = min(distribution.low, value), max(distribution.high, value)
    if distribution.log and low <= 0:
        raise MuonlabError(
            f"a published setting must be above 0 where the search is on a log scale, not {value!r}"
        )
    if isinstance(distribution, IntDistribution):
        if value != int(value):
            raise MuonlabError(
                f"a published setting must be an integer like the searched ones, not {value!r}"
            )
        return IntDistribution(int(low), int(high), log=distribution.log)
    return FloatDistribution(low, high, log=distribution.log)


def suggest(trial: BaseTrial, name: str, distribution: BaseDistribution) -> None:
    """Let an Optuna trial draw one setting from its sampler."""
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
        return
    if isinstance(distribution, IntDistribution):
        step = 1 if distribution.log else distribution.step
        trial.suggest_int(name, distribution.low, distribution.high, step=step, log=distribution.log)
        return
    assert isinstance(distribution, FloatDistribution)
    trial.suggest_float(
        name,
        distribution.low,
        distribution.high,
        step=None if distribution.log else distribution.step,
        log=distribution.log,
    )


def edge(value: object, low: object, high: object, log: bool, share: float = 0.05) -> str:
    """ "lowest" or "highest" if `value` lies in the outer `share` of the range that was tried, else "".

    `log`: measured on a log scale. "" for a range of one value and for values that are not numbers.
    """
    numbers = [v for v in (value, low, high) if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < 3:
        return ""
    place, start, end = (math.log(v) for v in numbers) if log else numbers
    if not start < end:
        return ""
    position = (place - start) / (end - start)
    return "lowest" if position <= share else "highest" if position >= 1 - share else ""
