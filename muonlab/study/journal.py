"""A study's queue as a journal file: one line per operation, and a line cut short by a kill or a full disk is detected.

Optuna's own backend appends to such a half line, which makes the journal unreadable.
"""

import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record.database import only_process
from muonlab.record.files import write_atomic

TORN = ".torn"  # journal.log's torn lines are kept in journal.torn


class Journal(JournalFileBackend):
    """Optuna's journal file, of whole lines only. Processes may share it on one machine, or on a file system with locks
    (NFS 4, Lustre with flock); a lock ends with its process."""

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The operations from a number on, without an incomplete last line. Raises MuonlabError for a damaged line
        elsewhere, EnvironmentFault if the file cannot be read."""
        try:
            yield from super().read_logs(log_number_from)
        except ValueError as error:
            raise MuonlabError(
                f"{self._file_path} has a damaged line: {error}; python -m muonlab.study.repair"
                f" {Path(self._file_path).parent} sets it aside"
            ) from error
        except OSError as error:
            raise EnvironmentFault(f"cannot read {self._file_path}: {error.strerror}") from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append whole lines or nothing. Raises EnvironmentFault if the disk is full or the file stays locked."""
        path = Path(self._file_path)
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with only_process(path):
            try:
                cut_torn_line(path)
                _append(path, text.encode("utf-8"))
            except OSError as error:
                raise EnvironmentFault(f"cannot write {path}: {error.strerror}") from error


def cut_torn_line(path: Path) -> bytes:
    """Move an incomplete last line to the file of torn lines and return it; b"" if all lines are whole. The caller
    holds the journal's lock."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end, block = size, b""
        while end and b"\n" not in block:
            end = max(0, end - 4096)
            file.seek(end)
            block = file.read(size - end)
        whole = end + block.rfind(b"\n") + 1
        if whole == size:
            return b""
        torn = block[whole - end :]
        _append(path.with_suffix(TORN), torn + b"\n")
        file.truncate(whole)
    return torn


def set_damaged_lines_aside(path: Path) -> list[bytes]:
    """Move unreadable lines to the file of torn lines and return them; an operation that was appended to a half line is
    kept. The caller holds the journal's lock, and no worker is alive, since line numbers change."""
    cut = cut_torn_line(path)
    damaged, kept = [], []
    for line in path.read_bytes().splitlines():
        whole = _operation(line)
        if whole != line:
            damaged.append(line)
        if whole:
            kept.append(whole)
    if damaged:
        _append(path.with_suffix(TORN), b"".join(line + b"\n" for line in damaged))
        text = b"".join(line + b"\n" for line in kept)
        write_atomic(path, lambda temporary: temporary.write_bytes(text))
    return damaged + [cut] * bool(cut)


def _operation(line: bytes) -> bytes:
    """The last whole operation in a line; b"" if there is none."""
    for start in [0, *(match.start() for match in re.finditer(rb'\{"op_code":', line))]:
        try:
            value = json.loads(line[start:])
        except ValueError:
            continue
        if isinstance(value, dict) and "op_code" in value:
            return line[start:]
    return b""


def _append(path: Path, data: bytes) -> None:
    """Write all of `data` through to the disk, or nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
