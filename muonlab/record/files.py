"""Files that are either whole or not there: written beside their place and moved into it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muonlab.errors import MuonlabError


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
    """The value in `path`, or None where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MuonlabError(f"{path} is not JSON: {error}") from error
