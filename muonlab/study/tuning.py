"""The best setting of a search, and whether it lies at the edge of its range: one rule for sweeps and experiments."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from muonlab.record import load_run
from muonlab.study.design import Design, searches
from muonlab.study.slots import Level, Slot
from muonlab.study.space import edge, parse_space
from muonlab.study.work import objective

Trained = list[tuple[Slot, Path]]


@dataclass(frozen=True)
class Best:
    """The level with the lowest mean validation loss of an arm's search (nats; a diverged run counts with its initial
    loss).

    edge: set if it is the end of a range, so that a better one may lie beyond: "lowest" or "highest" of a list of
    levels, or "lr: lowest, weight_decay: highest" of a space; else "".
    """

    condition: str
    arm: str
    level: Level
    loss: float
    tried: int
    edge: str

    def __str__(self) -> str:
        setting = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in (self.level.setting or {}).items()
        )
        level = f"{self.level} ({setting})" if setting else str(self.level)
        text = f"{self.condition}/{self.arm}: best of {self.tried} levels is {level} (loss {self.loss:.4f})"
        return text + (f", the {self.edge} tried: a better one may lie beyond" if self.edge else "")


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
    else:
        at_edge = _edge_of_list([level.value for level in levels], best.value)
    return Best(condition, arm, best, means[best], len(levels), at_edge)


def _edge_of_list(values: list[object], value: object) -> str:
    numbers = [v for v in values if isinstance(v, float)]
    if len(numbers) < len(values) or len(numbers) < 2:
        return ""
    return edge(value, min(numbers), max(numbers), log=min(numbers) > 0)


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
