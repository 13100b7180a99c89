"""The right to write a run's folder: a lease that its holder renews, and that ends when it is no longer renewed.

The lease is a file in the folder, `.lease-000001`, which only one process can create. It names its holder, and its
modification time is the heartbeat. Nobody compares clocks of two machines: an observer watches with its own clock
whether the time *changes*. Where the holder is on the observer's machine, its process number answers at once. Whoever
takes over an ended lease creates the next number and removes the lower ones; a holder that was only asleep (stopped, or
cut off from a file server) learns from this that it has lost the lease.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from muonlab.errors import EnvironmentFault, MuonlabError, shown
from muonlab.record.owner import Owner

# Heartbeats after which a silent holder is presumed dead.
SILENCE = 3
PATTERN = ".lease-[0-9]*"


class LeaseLost(EnvironmentFault):
    """Another process has taken over the lease: nothing more may be written."""


def beat_seconds() -> float:
    """Seconds between two heartbeats: 10, or $MUONLAB_BEAT. Raises MuonlabError where that is not a positive number."""
    text = os.environ.get("MUONLAB_BEAT", "10")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise MuonlabError(
            f"$MUONLAB_BEAT, the seconds between two heartbeats, must be a positive number, not {shown(text)}"
        )
    return seconds


@dataclass
class Watch:
    """Remembers the heartbeats it saw, and distinguishes a silent holder from a living one.

    `now` is the clock that silence is measured by, in seconds by default.
    """

    now: Callable[[], float] = time.monotonic
    seen: dict[Hashable, tuple[object, float]] = field(default_factory=dict)

    def alive(self, key: Hashable, sign: object, every: float) -> bool:
        """Whether the heartbeat `sign` of `key` changed within three times `every`; true when it is first seen."""
        last, since = self.seen.get(key, (None, 0.0))
        if sign != last:
            self.seen[key] = sign, self.now()
            return True
        return self.now() - since < SILENCE * every


@dataclass(frozen=True)
class Held:
    """A lease as others see it. owner: None if its content is not written yet; every: seconds between heartbeats."""

    path: Path
    token: str
    owner: Owner | None
    every: float
    beat: int

    @property
    def number(self) -> int:
        """The number of the file: of two leases the higher one is valid."""
        return int(self.path.name.rpartition("-")[2])

    def alive(self, watch: Watch | None = None) -> bool | None:
        """Whether its holder lives; without a watch, None for a holder on another machine."""
        known = self.owner.alive if self.owner else None
        if known is None and watch is not None:
            return watch.alive((self.path, self.token), self.beat, self.every)
        return known


def held(folder: Path) -> Held | None:
    """The lease of a folder, whoever has it and whether or not that process lives; None where there is none."""
    for path in sorted(folder.glob(PATTERN), reverse=True):
        try:
            with path.open(
                encoding="utf-8"
            ) as file:  # opened, since a file server's answer to stat may be old
                content, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            continue  # released just now
        try:
            values = json.loads(content)
            return Held(path, values["token"], Owner.read(values), float(values["every"]), beat)
        except (ValueError, KeyError, TypeError):
            return Held(path, "", None, beat_seconds(), beat)
    return None


class Lease:
    """The lease of one folder, held by this process until `release`. Made by `take`; a thread renews it."""

    def __init__(self, path: Path, token: str, every: float):
        self.path, self.token, self.every = path, token, every
        self._lost = ""
        self._over = threading.Event()
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._renew, name=f"lease of {path.parent.name}", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path, watch: Watch | None = None) -> "Lease":
        """Take the lease of a folder whose holder is dead, or that has none.

        If the holder is on another machine this waits for up to three of its heartbeats, less what `watch` has seen
        already. Raises EnvironmentFault where the holder lives, or the folder cannot be written.
        """
        watch = watch or Watch()
        while True:
            earlier = held(folder)
            if earlier is not None:
                _wait_for_end(folder, earlier, watch)
            number = earlier.number + 1 if earlier else 1
            if (lease := cls._create(folder, number)) is not None:
                return lease

    @classmethod
    def _create(cls, folder: Path, number: int) -> "Lease | None":
        token, every = uuid.uuid4().hex, beat_seconds()
        path = folder / f".lease-{number:06d}"
        text = json.dumps({"token": token, "every": every, **Owner.this().values()})
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return None
        except OSError as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise EnvironmentFault(f"cannot write {path}: {error.strerror or error}") from error
        numbers = {other: int(other.name.rpartition("-")[2]) for other in folder.glob(PATTERN)}
        if max(numbers.values(), default=number) > number:  # two more were taken while this one was
            path.unlink(missing_ok=True)
            return None
        for other, lower in numbers.items():
            if lower < number:
                with suppress(OSError):
                    other.unlink(missing_ok=True)
        return cls(path, token, every)

    def moved(self, folder: Path) -> None:
        """The folder was renamed to `folder`."""
        self.path = folder / self.path.name

    def check(self) -> None:
        """Raises LeaseLost where another process has taken over; call it before anything is written.

        A takeover between this check and the write itself goes unnoticed: no file system has a lock for that.
        """
        if not self._lost and time.monotonic() - self._renewed > self.every:
            self._beat()  # it slept
        if not self._lost and not self._is_ours():
            self._lost = (
                f"{self.path.parent} was taken over by another process, since this one gave no sign of life"
            )
        if self._lost:
            raise LeaseLost(self._lost)

    def release(self) -> None:
        """Release the lease; a second call does nothing. In a folder that cannot be written it ends with the
        process."""
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if not self._lost and self._is_ours():
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))["token"] == self.token
        except FileNotFoundError:
            return False
        except OSError:
            return True  # the file server does not answer: nobody else can take it meanwhile either
        except (ValueError, KeyError, TypeError):
            return False

    def _renew(self) -> None:
        while not self._over.wait(self.every):
            self._beat()

    def _beat(self) -> None:
        # `check` notices a folder that is gone; one that is briefly read-only is tried again.
        with suppress(OSError):
            os.utime(self.path)
            self._renewed = time.monotonic()


def _wait_for_end(folder: Path, earlier: Held, watch: Watch) -> None:
    """Returns when the holder of `earlier` is dead or has released it. Raises EnvironmentFault when it lives."""
    first = earlier
    while True:
        current = held(folder)
        if current is None or current.number != first.number or current.token != first.token:
            if current is None:
                return
            raise _refusal(folder, current)
        known = current.owner.alive if current.owner else None
        if known is False:
            return
        if known is True or current.beat != first.beat:
            raise _refusal(folder, current)
        if not current.alive(watch):
            return
        time.sleep(min(0.2, current.every / 4))


def _refusal(folder: Path, lease: Held) -> EnvironmentFault:
    return EnvironmentFault(f"{folder} is being written by {lease.owner or 'a process that has just begun'}")
