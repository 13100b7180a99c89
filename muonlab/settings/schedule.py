"""The settings of each learning-rate schedule; a schedule is a factor on every group's learning rate at each step."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le

from muonlab.settings.check import Share, Steps

PositiveShare = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule:
    """1 after `warmup` steps of linear warm-up; 0: none."""

    name: Literal["constant"] = "constant"
    warmup: Steps = 20


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to `final`, the last step's share of the peak."""

    name: Literal["cosine"] = "cosine"
    warmup: Steps = 20
    final: Share = 0.1


@dataclass(frozen=True, kw_only=True)
class WSDSchedule:
    """Warm-up, stable at the peak, then linear to `final` over the last `decay` share of the steps."""

    name: Literal["wsd"] = "wsd"
    warmup: Steps = 20
    decay: PositiveShare = 0.2
    final: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class RampSchedule:
    """A stress test: exponential growth from `start` times the peak, after warm-up, to the peak at the last step."""

    name: Literal["ramp"] = "ramp"
    warmup: Steps = 20
    start: PositiveShare = 0.01


ScheduleSettings = ConstantSchedule | CosineSchedule | WSDSchedule | RampSchedule
SCHEDULE_SETTINGS: dict[str, type] = {
    "constant": ConstantSchedule,
    "cosine": CosineSchedule,
    "wsd": WSDSchedule,
    "ramp": RampSchedule,
}
