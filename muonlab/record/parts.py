"""The Parquet files of a run's traces: what they hold, how they are written, and which are whole.

Three traces: `steps`, one row per step, one column per scalar; `max_logits`, one row per step, layer and head;
`experts`, one row per step, layer that has experts, and expert. While a run lasts, each is a list of numbered parts
(`steps-0001.parquet`); once it has ended, one file (`steps.parquet`). A null means "not measured at this step", a NaN
"measured, and not a number".

Row groups hold whole steps in ascending order and the footer says which, so a trace is read, cut and merged one row
group at a time, however long it is.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record.columns import HEADS, SCALARS
from muonlab.record.files import set_aside, write_atomic

KEYS = {"steps": ("step",), "max_logits": ("step", "layer", "head"), "experts": ("step", "layer", "expert")}
"""The columns that identify a row of each trace."""
COLUMNS = {
    "steps": tuple(SCALARS),
    "max_logits": tuple(head.column for head in HEADS.values()),
    "experts": ("load",),
}
"""The other columns that every frame of a trace has, first and in this order, measured or not."""
ROWS = 1 << 16
"""Rows of a row group; those of one step where that has more."""


class TornTrace(MuonlabError):
    """A trace file that is damaged: cut short, overwritten, or with other columns."""


@dataclass(frozen=True)
class RowGroup:
    """`rows` rows of one file, from step `first` to step `last`."""

    index: int
    rows: int
    first: int
    last: int


@dataclass(frozen=True)
class TraceFile:
    """One file of the trace `name` (one of KEYS), by its footer."""

    path: Path
    name: str
    columns: tuple[str, ...]
    groups: tuple[RowGroup, ...]

    @classmethod
    def read(cls, path: Path, name: str) -> "TraceFile":
        """Read the footer. Raises TornTrace for a file that does not hold this trace, and FileNotFoundError."""
        with _judged(path):
            footer = pq.read_metadata(path)
            schema = footer.schema.to_arrow_schema()
            for key in KEYS[name]:
                if key not in schema.names:
                    raise pa.ArrowInvalid(f"it has no column {key}")
            for field in schema:
                if field.type not in (column_type(name, field.name), pa.null()):
                    raise pa.ArrowInvalid(f"its column {field.name} is {field.type}")
            groups = []
            for index in range(footer.num_row_groups):
                group = footer.row_group(index)
                steps = group.column(schema.names.index("step")).statistics
                if group.num_rows and not (steps and steps.has_min_max):
                    raise pa.ArrowInvalid("it does not say which steps it has")
                if group.num_rows:
                    groups.append(RowGroup(index, group.num_rows, steps.min, steps.max))
        return cls(path, name, tuple(schema.names), tuple(groups))

    def rows(self, group: RowGroup, schema: pa.Schema) -> pa.Table:
        """The rows of a group with the columns of `schema`, null where the file has no such column.

        Raises TornTrace where they cannot be read, and FileNotFoundError if the file has been replaced since.
        """
        held = [name for name in schema.names if name in self.columns]
        with _judged(self.path), pq.ParquetFile(self.path, page_checksum_verification=True) as file:
            if group.index >= file.num_row_groups:
                raise FileNotFoundError(self.path)
            table = file.read_row_group(group.index, held, use_threads=False)
            if any(table[key].null_count for key in KEYS[self.name]):
                raise pa.ArrowInvalid("it has rows without a place")
            nulls = pa.nulls(len(table))
            columns = [table[name] if name in held else nulls for name in schema.names]
            columns = [
                c if c.type == t else pc.cast(c, t) for c, t in zip(columns, schema.types, strict=True)
            ]
            return pa.table(columns, schema=schema)


def column_type(name: str, column: str) -> pa.DataType:
    """The type of a column of the trace `name`."""
    if column in KEYS[name]:
        return pa.int64()
    return pa.bool_() if (name, column) == ("max_logits", "exact") else pa.float64()


def schema_of(name: str, files: Iterable[TraceFile], columns: Sequence[str] | None = None) -> pa.Schema:
    """The columns of a trace in order: its keys, then COLUMNS, then whatever else its files have, sorted. Unless
    `columns` is None, only those in it are kept besides the keys."""
    always = [*KEYS[name], *COLUMNS[name]]
    others = sorted({column for file in files for column in file.columns} - set(always))
    kept = [c for c in (*always, *others) if columns is None or c in columns or c in KEYS[name]]
    return pa.schema([(column, column_type(name, column)) for column in kept])


def trace_files(folder: Path, name: str) -> list[Path]:
    """The files of a trace in the order in which they were written."""
    # The parts are listed first: a merge writes the whole file before it removes them.
    parts = [path for _, path in sorted(numbered_parts(folder, name).items())]
    whole = folder / f"{name}.parquet"
    return [whole, *parts] if whole.exists() else parts


def numbered_parts(folder: Path, name: str) -> dict[int, Path]:
    """The parts of a trace by their numbers."""
    numbered = [(path.stem.removeprefix(f"{name}-"), path) for path in folder.glob(f"{name}-*.parquet")]
    return {int(number): path for number, path in numbered if number.isdecimal()}


def write_trace(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables in ascending order of steps as one file, whose bytes depend on the rows alone."""

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in regrouped(tables):
                writer.write_table(table, row_group_size=len(table))

    write_atomic(path, write)


def regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, in tables of as many whole steps as fit in ROWS rows, and of at least one step."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) > ROWS:
            whole = pa.concat_tables(held).combine_chunks()
            while len(whole) > ROWS:
                # The step that no longer fits, or where the first one ends, which may continue in the next table.
                place = first_row(whole, whole["step"][ROWS].as_py())
                place = place or first_row(whole, whole["step"][0].as_py() + 1)
                if place == len(whole):
                    break
                yield whole.slice(0, place).combine_chunks()
                whole = whole.slice(place)
            held = [whole]
    if held:
        yield pa.concat_tables(held).combine_chunks()


def first_row(table: pa.Table, step: int) -> int:
    """The place of the first row at or after `step`."""
    return int(np.searchsorted(table["step"].to_numpy(), step))


def set_aside_torn(folder: Path) -> list[Path]:
    """Read every file of the traces to its end, rename those that are damaged to `<name>.torn`, and return their new
    paths. The rows in them are then missing (see `whole_until`); nothing is deleted."""
    aside = []
    for name in KEYS:
        for path in trace_files(folder, name):
            try:
                file = TraceFile.read(path, name)
                for group in file.groups:
                    file.rows(group, schema_of(name, [file]))
            except TornTrace:
                aside.append(set_aside(path))
    return aside


@contextmanager
def _judged(path: Path) -> Iterator[None]:
    """Distinguishes a damaged file from one that is missing or cannot be read at the moment."""
    try:
        yield
    except FileNotFoundError:
        raise
    except MemoryError as error:
        raise EnvironmentFault(f"cannot read {path}: there is not enough memory") from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow's own have none
            raise EnvironmentFault(f"cannot read {path}: {os.strerror(error.errno)}") from error
        why = " ".join(str(error).split())
        raise TornTrace(
            f"the trace {path} is damaged: {why}; a run that is over is trained again with force=true"
        ) from error
