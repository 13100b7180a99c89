"""Learning-rate schedules: a factor of every group's learning rate as a pure function of the step."""

import math
from collections.abc import Callable

from muonlab.registry import Registry
from muonlab.settings.schedule import ConstantSchedule, CosineSchedule, RampSchedule, WSDSchedule

Schedule = Callable[[int], float]
SCHEDULES: Registry[Schedule] = Registry("schedule")


def _warm(step: int, warmup: int) -> float:
    # (t + 1) / warmup: the first step is small but not lost.
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _progress(step: int, warmup: int, max_steps: int) -> float:
    """From 0 at the end of warm-up to 1 at the last step."""
    span = max(1, max_steps - 1 - warmup)
    return min(1.0, max(0, step - warmup) / span)


@SCHEDULES.register("constant")
def constant(max_steps: int, settings: ConstantSchedule) -> Schedule:
    """1 after the warm-up."""
    return lambda step: _warm(step, settings.warmup)


@SCHEDULES.register("cosine")
def cosine(max_steps: int, settings: CosineSchedule) -> Schedule:
    """final + (1 - final) (1 + cos(pi t)) / 2 with t from 0 after warm-up to 1 at the last step."""
    warmup, final = settings.warmup, settings.final

    def factor(step: int) -> float:
        t = _progress(step, warmup, max_steps)
        return _warm(step, warmup) * (final + (1 - final) * (1 + math.cos(math.pi * t)) / 2)

    return factor


@SCHEDULES.register("wsd")
def wsd(max_steps: int, settings: WSDSchedule) -> Schedule:
    """Stable at 1, then linear decay to `final` over the last `decay` share of the steps (arXiv 2404.06395)."""
    length, final = max(1, round(settings.decay * max_steps)), settings.final

    def factor(step: int) -> float:
        left = min(1.0, max(0, max_steps - 1 - step) / length)
        return _warm(step, settings.warmup) * (final + (1 - final) * left)

    return factor


@SCHEDULES.register("ramp")
def ramp(max_steps: int, settings: RampSchedule) -> Schedule:
    """Linear warm-up to `start`, then exponential growth: start^(1 - t) with t from 0 to 1 at the last step.

    One run then shows the learning rate at which an optimizer fails.
    """
    warmup, start = settings.warmup, settings.start
    return lambda step: _warm(step, warmup) * start ** (1 - _progress(step, warmup, max_steps))


def build_schedule(name: str, max_steps: int, **settings: object) -> Schedule:
    """The factor of the learning rate at each step, counted from 0.

    Raises MuonlabError for an unknown name or setting and for values out of range.
    """
    return SCHEDULES.build(name, settings, max_steps)
