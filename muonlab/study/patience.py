"""How a worker handles failures that say nothing about the settings: it pauses, tries again, and finally gives up."""

import time
from collections import Counter
from collections.abc import Callable

# Pauses, in seconds, double from the first to the longest while nothing ends well; after PAUSES of them, about five
# minutes in all, the worker gives up.
FIRST, LONGEST, PAUSES = 1.0, 60.0, 10
# A run that was killed this often is left for the next command: it may be what exhausts the machine's memory.
KILLS = 3
# After this many runs in a row that fail in the same way, the others would fail too.
SAME = 3


class Patience:
    """Counts what has gone wrong since something last went well.

    `say` receives one line whenever the cause changes.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._say, self._clock = say, clock
        self._pauses, self._until, self._cause = 0, clock(), ""
        self._kills: Counter[str] = Counter()
        self._failed: list[str] = []
        self._given_up: set[str] = set()
        self._broken = False
        self.causes: dict[str, str] = {}

    def well(self) -> None:
        """A run ended well, so whatever was wrong with the machine is over."""
        self._pauses, self._until, self._cause, self._failed = 0, self._clock(), "", []

    def fault(self, cause: str, slot: str | None = None) -> None:
        """The machine, the disk or a store refused something, to one slot's run or to the worker itself."""
        if slot is not None:
            self.causes[slot] = cause
        if self._clock() >= self._until:  # what fails during a pause began before it
            self._until = self._clock() + min(LONGEST, FIRST * 2**self._pauses)
            self._pauses += 1
        if cause != self._cause:
            self._cause = cause
            self._say(f"waiting and retrying with growing pauses: {cause}")

    def killed(self, slot: str, cause: str) -> None:
        """A slot's run was killed."""
        self._kills[slot] += 1
        if self._kills[slot] >= KILLS:
            self._given_up.add(slot)
        self.fault(cause, slot)

    def failed(self, slot: str, cause: str, reason: str) -> None:
        """A slot's run failed with an error of its own, `reason`; `cause` also says where its log is."""
        self.causes[slot] = cause
        self._given_up.add(slot)
        self._failed = [*(earlier for earlier in self._failed if earlier == reason), reason]
        self._broken = self._broken or len(self._failed) >= SAME

    @property
    def pause(self) -> float:
        """Seconds until the next try."""
        return max(0.0, self._until - self._clock())

    @property
    def end(self) -> str:
        """Why the rest of the study is left for the next command; "" while trying goes on."""
        if self._broken:
            return f"{SAME} runs in a row failed in the same way"
        if self._pauses >= PAUSES and not self.pause:
            return f"nothing succeeded in {PAUSES} tries with growing pauses"
        return ""

    def given_up(self, slot: str) -> bool:
        """Whether the slot is left for the next command."""
        return slot in self._given_up
