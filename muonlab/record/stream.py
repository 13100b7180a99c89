"""Reading the traces in order of steps, a few row groups at a time."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from muonlab.errors import MuonlabError
from muonlab.record.parts import KEYS, TraceFile, first_row, regrouped, schema_of, trace_files

TRIES = 10
"""How often a trace may change while it is read: a run changes it once, at its end."""


def stream_trace(
    folder: Path, name: str, columns: Sequence[str] | None = None, after: int = -1
) -> Iterator[pa.Table]:
    """The rows of the trace `name` (one of KEYS) after a step, sorted by its keys, each row once: where one was
    written twice, each column has its last measured value.

    In tables of whole steps with at most ROWS rows, or one step: memory does not grow with the length. The columns
    are the keys, then those in `columns` (None: all), in the order of `schema_of`. If the run ends
    meanwhile and its parts are merged, reading continues in the merged file. Raises TornTrace at a damaged file.
    """
    return regrouped(_stream(folder, name, columns, after))


def read_trace(folder: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All of `stream_trace` as one table; without rows where the run has no such trace."""
    pieces = list(stream_trace(folder, name, columns))
    return pa.concat_tables(pieces or [schema_of(name, [], columns).empty_table()]).combine_chunks()


def trace_extent(folder: Path, name: str) -> tuple[pa.Schema, int]:
    """The columns of a trace, and an upper bound on its rows: those that were written twice count twice."""
    files = _opened(folder, name)
    return schema_of(name, files), sum(group.rows for file in files for group in file.groups)


def whole_until(folder: Path) -> int:
    """The last step up to which, from step 0 on, no step is missing in any trace of the run; -1: step 0 is missing.

    A trace whose files were all set aside as torn counts as a trace of the run. Raises TornTrace at a damaged file.
    """
    ends = []
    for name in KEYS:
        if trace_files(folder, name) or any(folder.glob(f"{name}*.parquet.torn*")):
            end = -1
            for table in stream_trace(folder, name, ()):
                steps = np.unique(table["step"].to_numpy())
                whole = int(np.argmin(np.append(steps == np.arange(end + 1, end + 1 + len(steps)), False)))
                end += whole
                if whole < len(steps):
                    break
            ends.append(end)
    return min(ends, default=-1)


def _opened(folder: Path, name: str) -> list[TraceFile]:
    for _ in range(TRIES):
        try:
            return [TraceFile.read(path, name) for path in trace_files(folder, name)]
        except FileNotFoundError:  # the run was ending: its parts have just been merged
            continue
    raise _unsteady(folder, name)


def _stream(folder: Path, name: str, columns: Sequence[str] | None, after: int) -> Iterator[pa.Table]:
    for _ in range(TRIES):
        try:
            for table in _stream_files(folder, name, columns, after):
                yield table
                after = table["step"][-1].as_py()
            return
        except FileNotFoundError:
            continue
    raise _unsteady(folder, name)


def _unsteady(folder: Path, name: str) -> MuonlabError:
    return MuonlabError(f"the trace {name} in {folder} kept changing while it was read; try again")


def _stream_files(folder: Path, name: str, columns: Sequence[str] | None, after: int) -> Iterator[pa.Table]:
    """Rows wait until no row group that is still to be read begins before their step."""
    files = _opened(folder, name)
    schema = schema_of(name, files, columns)
    groups = [
        (order, group) for order, file in enumerate(files) for group in file.groups if group.last > after
    ]
    waiting: list[tuple[int, pa.Table]] = []
    for order, group in sorted(groups, key=lambda item: (item[1].first, item[0])):
        begin = max(group.first, after + 1)
        ready, waiting = _split(waiting, begin)
        if ready:
            yield _joined(ready, name)
        waiting += _split([(order, files[order].rows(group, schema))], begin)[1]
    if waiting:
        yield _joined(waiting, name)


def _split(
    waiting: list[tuple[int, pa.Table]], step: int
) -> tuple[list[tuple[int, pa.Table]], list[tuple[int, pa.Table]]]:
    """The rows before a step, and the rest."""
    before, rest = [], []
    for order, table in waiting:
        place = first_row(table, step)
        before += [(order, table.slice(0, place))] if place else []
        rest += [(order, table.slice(place))] if place < len(table) else []
    return before, rest


def _joined(waiting: list[tuple[int, pa.Table]], name: str) -> pa.Table:
    """One sorted table; of a row that was written twice, the last measured values."""
    tables = [table for _, table in sorted(waiting, key=lambda item: item[0])]
    table = pa.concat_tables(tables)
    ends = [(part["step"][0].as_py(), part["step"][-1].as_py()) for part in tables]
    if any(first <= last for (_, last), (first, _) in pairwise(ends)):
        keys, columns = list(KEYS[name]), table.column_names
        values = [column for column in columns if column not in keys]
        table = table.group_by(keys, use_threads=False).aggregate([(column, "last") for column in values])
        table = table.select([*keys, *(f"{column}_last" for column in values)]).rename_columns(columns)
        table = table.sort_by([(key, "ascending") for key in keys])
    if "exact" in table.column_names:  # records older than the bounds lack it
        place = table.column_names.index("exact")
        table = table.set_column(place, "exact", pc.fill_null(table["exact"], True))
    return table
