"""How a study stands: the best run of each arm, the runs under way, and the faults so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from muonlab.study.slots import Slot

if TYPE_CHECKING:
    from muonlab.study.queue import Attempt

# Ends of attempts that are faults: of the machine, the disk, a store, or of the run itself.
FAULTS = ("killed", "environment", "failed")


@dataclass(frozen=True)
class BestRun:
    """The lowest loss (nats) of an arm so far, of how many counted runs, and the slot that has it."""

    arm: str
    loss: float
    slot: str
    setting: dict[str, object]
    runs: int


@dataclass(frozen=True)
class LiveRun:
    """A run that a worker has: its last finished step (None: none yet), of how many, and the training loss (nats) and
    largest max logit last known (None: not known)."""

    slot: str
    step: int | None
    steps: int
    loss: float | None
    max_logit: float | None


@dataclass(frozen=True)
class Fault:
    """An attempt that ended without a result, and why."""

    slot: str
    status: str
    cause: str


@dataclass(frozen=True)
class Standing:
    """The best run of each arm that has one, in the order of the slots, and every fault."""

    best: tuple[BestRun, ...] = ()
    faults: tuple[Fault, ...] = ()


def standing(slots: Sequence[Slot], attempts: Sequence["Attempt"]) -> Standing:
    """How these slots stand by the attempts at them."""
    arms = {slot.name: f"{slot.condition}/{slot.arm}" for slot in slots}
    by_arm: dict[str, list[tuple[float, Attempt]]] = {}
    for attempt in attempts:
        if attempt.value is not None:
            by_arm.setdefault(arms[attempt.slot], []).append((attempt.value, attempt))
    best = []
    for arm, counted in by_arm.items():
        loss, run = min(counted, key=lambda item: item[0])
        best.append(BestRun(arm, loss, run.slot, dict(run.setting), len(counted)))
    faults = (Fault(each.slot, each.status, each.cause) for each in attempts if each.status in FAULTS)
    return Standing(tuple(best), tuple(faults))


def setting_text(setting: Mapping[str, object]) -> str:
    """A setting as people read it: lr 0.02, weight_decay 0.1."""
    return ", ".join(f"{key} {v:.3g}" if isinstance(v, float) else f"{key} {v}" for key, v in setting.items())
