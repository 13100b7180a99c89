"""Search spaces in Hydra's override syntax, as Optuna distributions and as points of the unit cube."""

import math
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from muonlab.errors import MuonlabError


def parse_space(space: dict[str, str]) -> dict[str, BaseDistribution]:
    """{"lr": "tag(log, interval(3e-4, 3e-2))"} -> {"lr": FloatDistribution(log=True, ...)}.

    interval(a, b) is a real number (`tag(log, ...)`: uniform in its logarithm; int(interval(...)): a whole one),
    choice(a, b) one of the values, range(a, b, step) a whole number. Raises MuonlabError for anything else.
    """
    return {name: _distribution(name, str(text)) for name, text in space.items()}


def _distribution(name: str, text: str) -> BaseDistribution:
    allowed = "allowed are interval(a, b), tag(log, interval(a, b)), choice(a, b, ...) and range(a, b, step)"
    try:
        sweep = OverridesParser.create().parse_override(f"{name}={text}").value()
    except HydraException as error:
        raise MuonlabError(f"search space of {name}: '{text}' cannot be read; {allowed}") from error
    if isinstance(sweep, IntervalSweep):
        low, high, log = sweep.start, sweep.end, "log" in sweep.tags
        if not low < high or (log and low <= 0):
            raise MuonlabError(
                f"search space of {name}: '{text}' is empty" + (" on a log scale" if log else "")
            )
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low), float(high), log=log)
    if isinstance(sweep, ChoiceSweep):
        return CategoricalDistribution([getattr(v, "text", v) for v in sweep.list])
    if isinstance(sweep, RangeSweep):
        low, stop, step = int(sweep.start), int(sweep.stop), int(sweep.step)
        return IntDistribution(low, low + step * ((stop - 1 - low) // step), step=step)
    raise MuonlabError(f"search space of {name}: '{text}' is one value; {allowed}")


def at(distribution: BaseDistribution, u: float) -> Any:
    """The value at the quantile u in [0, 1) of a distribution.

    Log scale: low (high / low)^u. Whole numbers and choices: equal shares of [0, 1).
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(u * len(distribution.choices))]
    low, high = distribution.low, distribution.high
    if isinstance(distribution, IntDistribution):
        if distribution.log:
            return min(high, int(math.exp(math.log(low) + u * (math.log(high + 1) - math.log(low)))))
        return low + distribution.step * int(u * ((high - low) // distribution.step + 1))
    return low * (high / low) ** u if distribution.log else low + u * (high - low)


def quasi_random(distributions: dict[str, BaseDistribution], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` settings at the points of a scrambled Halton sequence; more of them begin with the same ones.

    Every optimizer whose space has as many dimensions gets the very same points of the unit cube, so that none is
    luckier than another.
    """
    from scipy.stats import qmc

    points = qmc.Halton(len(distributions), scramble=True, rng=seed).random(count)
    return [{n: at(d, u) for (n, d), u in zip(distributions.items(), p, strict=True)} for p in points]


def edge(distribution: BaseDistribution, value: Any, share: float = 0.05) -> str:
    """ "lower" or "upper" where `value` lies in the outer `share` of its range, else ""; choices have no edge."""
    if isinstance(distribution, CategoricalDistribution):
        return ""
    low, high, value = float(distribution.low), float(distribution.high), float(value)
    if distribution.log:
        low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
    position = (value - low) / (high - low)
    return "lower" if position <= share else "upper" if position >= 1 - share else ""
