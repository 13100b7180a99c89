"""Learning-rate schedules: a factor of every group's learning rate as a pure function of the step."""

import math
from collections.abc import Callable

from muonlab.errors import MuonlabError
from muonlab.registry import Registry

Schedule = Callable[[int], float]
SCHEDULES = Registry("schedule")


def _warm(step: int, warmup: int) -> float:
    # (t + 1) / warmup: the first step is small but not lost.
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _check(max_steps: int, warmup: int, final: float = 0.0, decay: float = 1.0) -> None:
    if not 0 <= warmup <= max_steps:
        raise MuonlabError(f"schedule.warmup={warmup} must lie between 0 and the run's {max_steps} steps")
    if not 0 <= final <= 1:
        raise MuonlabError(f"schedule.final={final} must lie between 0 and 1: it is a share of the peak")
    if not 0 < decay <= 1:
        raise MuonlabError(f"schedule.decay={decay} must lie in (0, 1]: it is a share of all steps")


@SCHEDULES.register("constant")
def constant(max_steps: int, *, warmup: int = 20) -> Schedule:
    """1 after `warmup` steps of linear warm-up (0: none)."""
    _check(max_steps, warmup)
    return lambda step: _warm(step, warmup)


@SCHEDULES.register("cosine")
def cosine(max_steps: int, *, warmup: int = 20, final: float = 0.1) -> Schedule:
    """Linear warm-up, then final + (1 - final) (1 + cos(pi t)) / 2 with t from 0 to 1 at the last step."""
    _check(max_steps, warmup, final)
    span = max(1, max_steps - 1 - warmup)

    def factor(step: int) -> float:
        t = min(1.0, max(0, step - warmup) / span)
        return _warm(step, warmup) * (final + (1 - final) * (1 + math.cos(math.pi * t)) / 2)

    return factor


@SCHEDULES.register("wsd")
def wsd(max_steps: int, *, warmup: int = 20, decay: float = 0.2, final: float = 0.0) -> Schedule:
    """Warm-up, stable at 1, linear decay to `final` over the last `decay` share of the steps (arXiv 2404.06395)."""
    _check(max_steps, warmup, final, decay)
    length = max(1, round(decay * max_steps))

    def factor(step: int) -> float:
        left = min(1.0, max(0, max_steps - 1 - step) / length)
        return _warm(step, warmup) * (final + (1 - final) * left)

    return factor


@SCHEDULES.register("ramp")
def ramp(max_steps: int, *, warmup: int = 20, start: float = 0.01) -> Schedule:
    """Linear warm-up to `start`, then exponential growth to 1 at the last step: start^(1 - t) with t from 0 to 1.

    A stress test, which finds the learning rate at which an optimizer fails within one run.
    """
    _check(max_steps, warmup)
    if not 0 < start <= 1:
        raise MuonlabError(
            f"schedule.start={start} must lie in (0, 1]: it is the first learning rate over the last"
        )
    span = max(1, max_steps - 1 - warmup)
    return lambda step: _warm(step, warmup) * start ** (1 - min(1.0, max(0, step - warmup) / span))


def build_schedule(name: str, max_steps: int, **settings: float) -> Schedule:
    """The factor of the learning rate at each step, counted from 0.

    Raises MuonlabError for an unknown name or setting and for values out of range.
    """
    return SCHEDULES.build(name, max_steps, **settings)
