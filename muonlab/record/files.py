"""Files that are either whole or not there: written beside their place and moved into it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muonlab.errors import MuonlabError


def check_folder(path: Path, place: str) -> None:
    """Raises MuonlabError for a path at which no folder can be, since it or a part of it is a file or too long;
    `place` is the setting that names it."""
    try:
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        fault = "" if nearest.is_dir() else f"{nearest} is no folder"
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        raise MuonlabError(f"{place}={path} cannot be a folder: {fault}")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path and move the result to `path`, so that no reader and no kill -9 ever
    leaves half a file there. Raises MuonlabError where the folder cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True) if path.parent.is_dir() else None
        raise MuonlabError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as standard JSON (NaN and infinities are refused: they have no JSON form)."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """The value in `path`, or None where there is no such file. Raises MuonlabError for a file without JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MuonlabError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise MuonlabError(f"{path} is not JSON: {error}") from error
