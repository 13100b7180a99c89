"""Which process does something, and whether it still lives."""

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Owner:
    """A process: its host, its number there, when it began (clock ticks since boot), and the machine that counts them.

    `machine` is a boot of a kernel and a namespace of process numbers, since host names and process numbers are equal
    in two containers of the same image; `pid_started` tells the process from a later one of the same number. Both are
    None where the system does not say them (no /proc).
    """

    host: str
    pid: int
    pid_started: int | None
    machine: str | None = None

    @classmethod
    def this(cls) -> "Owner":
        """The process that asks."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, process_start(pid), machine())

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Owner":
        """What `values` wrote, from a mapping that may hold more."""
        return cls(values["host"], values["pid"], values.get("pid_started"), values.get("machine"))

    def values(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def alive(self) -> bool | None:
        """Whether it still runs; None where that cannot be known from here, since it was on another machine."""
        if self.machine is None or self.machine != machine():
            return None
        return self.pid_started is not None and process_start(self.pid) == self.pid_started


@cache
def machine() -> str | None:
    """This boot of this kernel and the namespace of its process numbers; None where the system does not say them."""
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
