"""Where and with what a run was computed: enough to repeat it, or to see why a repetition differs."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import cast

from muonlab.settings.address import without_password

Plain = str | int | float | None
PACKAGES = ("muonlab", "torch", "lightning", "hydra-core", "optuna", "mlflow", "numpy", "pandas", "pyarrow")
SPEED_VARIABLES = ("OMP_", "GOMP_", "MKL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES")
"""Environment variables (by their beginning) that change how fast, or where, a run computes."""
CODE = ("muonlab", "conf", "analysis", "experiments")
"""The folders that can change a result: the code that trains and judges, the settings, and the questions. Package
versions are recorded separately, so requirement files do not count."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Of a process and the machine under it.

    commit: 40 hex digits, None outside a git checkout; dirty: a folder of CODE differs from it. command: as it was
    typed. packages: versions by name, None where one is not installed. cores: processors of the machine. memory_gib:
    of the machine, in GiB. accelerators: names of its GPUs, if torch is loaded. environment_variables: those of
    SPEED_VARIABLES. data: what the run read (see TokenData.describe), empty if nothing.
    """

    commit: str | None = None
    dirty: bool | None = None
    command: str = ""
    python: str = ""
    packages: Mapping[str, str | None] = field(default_factory=dict)
    platform: str = ""
    host: str = ""
    cpu: str = ""
    cores: int | None = None
    memory_gib: float | None = None
    accelerators: Sequence[str] = ()
    environment_variables: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Plain] = field(default_factory=dict)

    @classmethod
    def read(cls, values: Mapping[str, object]) -> "Environment":
        """The environment with these `values()`; entries that only another version of muonlab has are dropped, missing
        ones are empty."""
        known = {spec.name: values[spec.name] for spec in fields(cls) if spec.name in values}
        known["accelerators"] = tuple(cast(Sequence[str], known.get("accelerators", ())))
        return cls(**known)  # type: ignore[arg-type]  # values of JSON

    def values(self) -> dict[str, object]:
        """As plain values, for a JSON file."""
        return asdict(self)


def collect_environment() -> Environment:
    """Of this process. Imports nothing heavy: accelerators are listed only where torch is loaded already."""
    commit, dirty = code_version()
    return Environment(
        commit=commit,
        dirty=dirty,
        command=without_password(shlex.join(sys.orig_argv)),
        python=platform.python_version(),
        packages=dict(_packages()),
        platform=platform.platform(),
        host=socket.gethostname(),
        cpu=_cpu(),
        cores=os.cpu_count(),
        memory_gib=_memory_gib(),
        accelerators=tuple(_accelerators()),
        environment_variables={
            name: value for name, value in sorted(os.environ.items()) if name.startswith(SPEED_VARIABLES)
        },
    )


@cache
def code_version() -> tuple[str | None, bool | None]:
    """(commit, dirty) of the code, read once per process; None, None outside a git checkout."""
    package = Path(__file__).resolve().parents[1]
    # An installed copy may lie inside somebody else's repository: only a tracked file makes it ours.
    if _git(package, "ls-files", "--error-unmatch", "errors.py") is None:
        return None, None
    commit = (_git(package, "rev-parse", "HEAD") or "").strip() or None
    return commit, bool((_git(package.parent, "status", "--porcelain", "--", *CODE) or "").strip())


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@cache
def _packages() -> tuple[tuple[str, str | None], ...]:
    versions: list[tuple[str, str | None]] = []
    for name in PACKAGES:
        try:
            versions.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            versions.append((name, None))
    return tuple(versions)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _accelerators() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
