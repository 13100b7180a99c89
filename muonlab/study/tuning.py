"""The best setting of a search, and whether it lies at the edge of its range: one rule for sweeps and experiments."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from muonlab.record import load_run
from muonlab.study.design import Design, Varied, searches
from muonlab.study.slots import Level, Slot
from muonlab.study.space import edge, parse_space
from muonlab.study.study import Study
from muonlab.study.work import objective

Trained = list[tuple[Slot, Path]]


@dataclass(frozen=True)
class Best:
    """The level with the lowest mean validation loss of an arm's search (nats; a diverged run counts with its initial
    loss).

    edge: where it is the end of a range, so that a better one may lie beyond: "lowest" or "highest" of a list of
    levels, or "lr: lowest, weight_decay: highest" of several keys; else "". sides: the same as places in
    `vary`. extended: how often its condition's ranges grew.
    """

    condition: str
    arm: str
    level: Level
    loss: float
    tried: int
    edge: str
    sides: tuple[tuple[int, str], ...] = ()
    extended: int = 0

    def __str__(self) -> str:
        setting = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in (self.level.setting or {}).items()
        )
        level = f"{self.level} ({setting})" if setting else str(self.level)
        return _sentence(self.condition, self.arm, self.tried, level, self.loss, self.edge, self.extended)


class StoredBest(Protocol):
    """A row of tuned.csv, whose column `extended` older tables lack."""

    condition: str
    arm: str
    tried: int
    level: object
    loss: float
    edge: str


def stored_best(row: StoredBest) -> str:
    """The sentence of one row of tuned.csv."""
    extended = getattr(row, "extended", 0)
    return _sentence(row.condition, row.arm, row.tried, row.level, row.loss, row.edge, extended)


def _sentence(
    condition: str, arm: str, tried: int, level: object, loss: float, edge: str, extended: int
) -> str:
    text = f"{condition}/{arm}: best of {tried} levels is {level} (loss {loss:.4f})"
    text += f", the ranges extended {extended}x" if extended else ""
    return text + (f", the {edge} tried: a better one may lie beyond" if edge else "")


def best_levels(trained: Trained, design: Design) -> list[Best]:
    """The best level of every arm that others are tuned on: the lowest mean loss; of equal ones, the first."""
    losses: dict[tuple[str, str], dict[Level, list[float]]] = {}
    for slot, folder in trained:
        if slot.condition in design.tuning_conditions:
            levels = losses.setdefault((slot.condition, slot.arm), {})
            levels.setdefault(slot.level, []).append(objective(load_run(folder)))
    return [_best(design, condition, arm, levels) for (condition, arm), levels in losses.items()]


def levels_by_arm(best: Iterable[Best]) -> dict[str, dict[str, Level]]:
    """{condition: {arm: level}}."""
    levels: dict[str, dict[str, Level]] = {}
    for each in best:
        levels.setdefault(each.condition, {})[each.arm] = each.level
    return levels


def _best(design: Design, condition: str, arm: str, levels: Mapping[Level, list[float]]) -> Best:
    means = {level: float(np.mean(values)) for level, values in levels.items()}
    best = min(means, key=lambda level: math.inf if math.isnan(means[level]) else means[level])
    if best.setting is not None:
        at_edge = _edges_of_space(searches(design, condition).optimizers[arm].space, best.setting)
        return Best(condition, arm, best, means[best], len(levels), at_edge)
    varied = varied_by(design, condition, arm)
    if varied is None:
        return Best(condition, arm, best, means[best], len(levels), _edge_of_list(levels, best))
    sides = tuple(_sides(varied, list(levels), best))
    named = [(list(varied)[place], side) for place, side in sides]
    at_edge = ", ".join(f"{key}: {side}" if len(varied) > 1 else side for key, side in named)
    return Best(condition, arm, best, means[best], len(levels), at_edge, sides)


def varied_by(design: Design, condition: str, arm: str) -> Varied | None:
    """The `vary` of an arm, its own or its condition's; None where it has none."""
    return design.arms_of(condition)[arm].vary or design.conditions[condition].vary


def _sides(varied: Varied, levels: Sequence[Level], best: Level) -> Iterator[tuple[int, str]]:
    """The entries of `vary`, by their place, at whose lowest or highest value the best level is."""
    for place, entry in enumerate(varied):
        key = entry.split(",")[0].strip()
        values = [level.axes[key] for level in levels]
        numbers, value = list(filter(_is_number, values)), best.axes[key]
        if len(numbers) < len(values) or not _is_number(value):
            continue
        if side := edge(value, min(numbers), max(numbers), log=min(numbers) > 0):
            yield place, side


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------- ranges that grow
def with_ranges(
    study: Study, trained: Callable[[Study], Trained | None]
) -> tuple[Study, Trained, list[Best]] | None:
    """The study with its ranges extended as often as its design allows and its edges ask for, its runs before the tuned
    conditions, and the best levels. The same runs give the same ranges, whoever asks.

    trained: the runs of a study's searches; None where some are missing, and then nothing can be said.
    """
    asked = study.design.conditions
    while (runs := trained(study)) is not None:
        now = study.design.conditions
        found = [
            replace(best, extended=asked[best.condition].extend - now[best.condition].extend)
            for best in best_levels(runs, study.design)
        ]
        wider = extended(study.design, found)
        if wider is None:
            return study, runs, found
        study = replace(study, design=wider)
    return None


def extended(design: Design, found: Sequence[Best]) -> Design | None:
    """The design whose ranges have one step more wherever the best level of any arm is at an edge: the same for every
    arm of its condition, so that all have equally many levels. None where nothing grows, or may grow no more."""
    conditions = dict(design.conditions)
    for name in design.tuning_conditions:
        section = conditions[name]
        sides = {side for best in found if best.condition == name for side in best.sides}
        if section.extend and sides:
            arms = {
                arm: {**given, "vary": _wider(given["vary"], sides)}
                if isinstance(given, Mapping) and given.get("vary")
                else given
                for arm, given in section.arms.items()
            }
            vary = None if section.vary is None else _wider(section.vary, sides)
            conditions[name] = replace(section, arms=arms, vary=vary, extend=section.extend - 1)
    return None if conditions == dict(design.conditions) else replace(design, conditions=conditions)


def _wider(varied: Varied, sides: Collection[tuple[int, str]]) -> dict[str, list[object]]:
    wider: dict[str, list[object]] = {}
    for place, (entry, given) in enumerate(varied.items()):
        rows: list[list[Any]] = [
            list(row) if isinstance(row, Sequence) and not isinstance(row, str) else [row] for row in given
        ]
        if all(_is_number(row[0]) for row in rows):
            rows.sort(key=lambda row: row[0])
        if (place, "lowest") in sides:
            rows.insert(0, list(map(_beyond, rows[0], rows[1])))
        if (place, "highest") in sides:
            rows.append(list(map(_beyond, rows[-1], rows[-2])))
        wider[entry] = [row if len(row) > 1 else row[0] for row in rows]
    return wider


def _beyond(last: object, inner: object) -> object:
    """One more step, of a factor where both are positive."""
    if not _is_number(last) or not _is_number(inner) or last == inner:
        return last
    value = last * last / inner if min(last, inner) > 0 else 2 * last - inner
    return float(f"{value:.6g}")


def _edge_of_list(levels: Iterable[Level], best: Level) -> str:
    """Of named levels that are numbers."""
    numbers = [level.value for level in levels]
    values = [value for value in numbers if isinstance(value, float)]
    if len(values) < len(numbers) or len(values) < 2:
        return ""
    return edge(best.value, min(values), max(values), log=min(values) > 0)


def _edges_of_space(space: Mapping[str, str], setting: Mapping[str, object]) -> str:
    edges = []
    for key, distribution in parse_space(space).items():
        if isinstance(distribution, CategoricalDistribution):
            continue
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        value = setting[key]
        low, high = distribution.low, distribution.high
        if isinstance(value, int | float) and not low <= value <= high:
            continue  # a published setting outside the searched range
        if where := edge(value, low, high, distribution.log):
            edges.append(f"{key}: {where}")
    return ", ".join(edges)
