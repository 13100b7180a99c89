"""What faults act on, and what has to be put right after them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from chaos.processes import Process, living
from chaos.study import Places, Server


@dataclass
class Scene:
    """What faults act on. longest_lock: seconds for which a database may be locked. pending: (due, what to do) of the
    faults that last, by the monotonic clock."""

    mark: str
    places: Places
    random: Random
    server: Server | None
    longest_lock: float
    pending: list[tuple[float, Callable[[], object]]] = field(default_factory=list)

    def one(self, *roles: str) -> Process | None:
        """A living process with one of the roles."""
        candidates = living(self.mark, *roles)
        return self.random.choice(candidates) if candidates else None

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Put something right again later."""
        self.pending.append((time.monotonic() + seconds, act))

    def settle(self, everything: bool = False) -> None:
        """Put right what is due, or all of it."""
        now = time.monotonic()
        due = [act for at, act in self.pending if everything or at <= now]
        self.pending = [(at, act) for at, act in self.pending if not (everything or at <= now)]
        for act in due:
            act()
