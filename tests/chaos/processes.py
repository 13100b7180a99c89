"""The processes of a round, found in /proc by a variable of their environment, and what each of them does.

A process keeps the environment of the one that started it, whoever dies in between: no orphan is overlooked.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "MUONLAB_CHAOS"
ROLES = ("parent", "worker", "fork server", "run")


@dataclass(frozen=True)
class Process:
    """role: one of ROLES, or "other" (a resource tracker, git)."""

    pid: int
    role: str

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a process that ended meanwhile is none."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def hears(self) -> bool:
        """Whether it has taken over SIGTERM. Before that Python itself starts, which answers a signal with a traceback
        or with death, whatever program it was asked to run."""
        bit = 1 << (signal.SIGTERM - 1)
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return False
        masks = [line.split()[1] for line in status.splitlines() if line.startswith(("SigCgt", "SigBlk"))]
        return any(int(mask, 16) & bit for mask in masks)

    def __str__(self) -> str:
        return f"{self.role} {self.pid}"


def living(mark: str, *roles: str) -> list[Process]:
    """The processes of the round `mark` that have one of these roles; without roles all of them."""
    wanted = f"{MARK}={mark}".encode()
    everything = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is somebody else's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                everything.append(Process(int(folder.name), _role(folder)))
    return [process for process in everything if not roles or process.role in roles]


def _role(folder: Path) -> str:
    command = _command(folder)
    if "multiprocessing.forkserver" in command:
        parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        # The fork server's children have its command line; an orphan among them is known by where it writes.
        forked = "multiprocessing.forkserver" in _command(folder.parent / parent)
        return "run" if forked or _logs(folder) else "fork server"
    for words, role in (
        ("multiprocessing.resource_tracker", "other"),
        ("muonlab.worker", "worker"),
        ("muonlab.sweep", "parent"),
        ("muonlab.experiment", "parent"),
    ):
        if words in command:
            return role
    return "other"


def _logs(folder: Path) -> bool:
    """Whether a process writes into a study's folder of logs."""
    return Path(os.readlink(folder / "fd" / "1")).parent.name == "logs"


def _command(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def crash(processes: Sequence[Process]) -> Iterator[None]:
    """Stop the processes, do to their files what a crash of the machine does, and kill them."""
    for process in processes:
        process.send(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send(signal.SIGKILL)


def end(mark: str) -> None:
    """Kill everything of the round, and wait until it is gone."""
    while left := living(mark):
        for process in left:
            process.send(signal.SIGKILL)
        time.sleep(0.02)
