"""Which process owns something, and whether it is still alive."""

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process: its host, its number there, when it began (clock ticks since boot), and the machine that counts them.

    `machine` is a boot of a kernel and a namespace of process numbers, since host names and process numbers can be
    equal in two containers of the same image; `pid_started` distinguishes the process from a later one with the same
    number. Both are None where the system does not report them (no /proc).
    """

    host: str
    pid: int
    pid_started: int | None
    machine: str | None = None

    @classmethod
    def this(cls) -> "Owner":
        """The calling process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, process_start(pid), machine())

    @classmethod
    def read(cls, values: Mapping[str, object]) -> "Owner":
        """The owner whose `values` are in a mapping that may hold more. Raises KeyError or TypeError where they are
        not."""
        host, pid = values["host"], values["pid"]
        pid_started, machine = values.get("pid_started"), values.get("machine")
        if not (
            isinstance(host, str)
            and isinstance(pid, int)
            and isinstance(pid_started, int | None)
            and isinstance(machine, str | None)
        ):
            raise TypeError(f"not the values of a process: {host!r}, {pid!r}, {pid_started!r}, {machine!r}")
        return cls(host, pid, pid_started, machine)

    def values(self) -> dict[str, str | int | None]:
        """As plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def alive(self) -> bool | None:
        """Whether it still runs; None where that cannot be determined, since it ran on another machine."""
        if self.machine is None or self.machine != machine():
            return None
        return self.pid_started is not None and process_start(self.pid) == self.pid_started


@cache
def machine() -> str | None:
    """This boot of this kernel and the namespace of its process numbers; None where the system does not report them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None where there is no such process, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
