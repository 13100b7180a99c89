"""Files that are either whole or absent: written under a temporary name and moved into place."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record.owner import machine, process_start


def check_folder(path: Path, place: str) -> None:
    """Raises MuonlabError for a path that cannot be a folder, since it or a parent is a file or its name is too long;
    `place` is the setting that names it."""
    try:
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        fault = "" if nearest.is_dir() else f"{nearest} is not a folder"
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        raise MuonlabError(f"{place}={path} cannot be a folder: {fault}")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path and move the result to `path`, so that no reader ever sees, and no kill -9 ever
    leaves, half a file there. Raises EnvironmentFault where the folder cannot be written, or the disk is full."""
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise EnvironmentFault(f"cannot write {path}: {error.strerror or error}") from error
        raise


def temporary_path(path: Path) -> Path:
    """A hidden path beside `path` that no other process uses; its name tells which process it belongs to."""
    return path.with_name(f".{path.name}.{_process(os.getpid())}.{uuid.uuid4().hex[:6]}.tmp")


def remove_leftovers(folder: Path, name: str = "*") -> list[Path]:
    """Remove the temporary files and folders for `name` in `folder` that killed processes of this machine left behind,
    and return their paths."""
    removed = []
    for path in folder.glob(f".{name}.tmp"):
        owner = re.search(r"\.(\w+)-(\d+)-(\d+)\.\w+\.tmp$", path.name)
        if owner is None or owner[1] != _machine() or process_start(int(owner[2])) == int(owner[3]):
            continue
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(path)
    return removed


def set_aside(path: Path) -> Path:
    """Rename `path` to the first free of `<name>.torn`, `<name>.torn-2`, ..., and return the new path."""
    new, number = path.with_name(f"{path.name}.torn"), 2
    while new.exists():
        new, number = path.with_name(f"{path.name}.torn-{number}"), number + 1
    return path.rename(new)


def _process(pid: int) -> str:
    return f"{_machine()}-{pid}-{process_start(pid) or 0}"


def _machine() -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, machine() or "").hex[:8]


def write_json(path: Path, value: object) -> None:
    """Write `value` as standard JSON (NaN and infinities raise ValueError: JSON has no form for them)."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> object:
    """The value in `path`, or None where there is no such file. Raises MuonlabError for a file that is not
    JSON, EnvironmentFault for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise MuonlabError(f"{path} is not JSON: {error}") from error
