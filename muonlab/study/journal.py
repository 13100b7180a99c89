"""A study's queue as a journal file: one line an operation, so that a line which a kill or a full disk cut is seen.

Optuna's own backend appends to such a half line, and nobody can read the journal any more.
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
    """Optuna's journal file with whole lines only. Several processes may share it, on one machine or by a file system
    that has locks (NFS 4, Lustre with flock); a lock ends with its process."""

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The operations from a number on, without a last line that is not whole. Raises MuonlabError for a damaged
        line before others, EnvironmentFault where the file cannot be read."""
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
        """Append whole lines or nothing. Raises EnvironmentFault where the disk is full or the file stays locked."""
        path = Path(self._file_path)
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with only_process(path):
            try:
                cut_torn_line(path)
                _append(path, text.encode("utf-8"))
            except OSError as error:
                raise EnvironmentFault(f"cannot write {path}: {error.strerror}") from error


def cut_torn_line(path: Path) -> bytes:
    """Move a last line without an end to the file of torn lines; what it held, b"" where all lines are whole. Call it
    under the lock of the journal."""
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
    """Move each line that cannot be read to the file of torn lines, but for the operation that was appended to a half
    line; these lines. Call it under the lock of the journal, while no worker lives: line numbers change."""
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
    """The last whole operation in a line, b"" where there is none."""
    for start in [0, *(match.start() for match in re.finditer(rb'\{"op_code":', line))]:
        try:
            held = json.loads(line[start:])
        except ValueError:
            continue
        if isinstance(held, dict) and "op_code" in held:
            return line[start:]
    return b""


def _append(path: Path, data: bytes) -> None:
    """Write all of `data` and wait for the disk, or nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
