"""Which process does something, and whether it still lives."""

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Owner:
    """A process: its host, its number there, and when it began (clock ticks since boot; None where nobody can tell).

    The beginning tells it from a later process of the same number.
    """

    host: str
    pid: int
    pid_started: int | None

    @classmethod
    def this(cls) -> "Owner":
        """The process that asks."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, process_start(pid))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Owner":
        """What `values` wrote, from a mapping that may hold more."""
        return cls(values["host"], values["pid"], values.get("pid_started"))

    def values(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @property
    def alive(self) -> bool | None:
        """Whether it still runs; None if that was on another host."""
        if self.host != socket.gethostname():
            return None
        if Path("/proc/self/stat").exists():
            return self.pid_started is not None and process_start(self.pid) == self.pid_started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None where there is no such process, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
