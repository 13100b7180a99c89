"""Full-resolution traces of a run: a buffer that never waits for the device, and Parquet files.

Three traces: `steps`, one row a step, one column a scalar; `max_logits`, one row per step, layer and head;
`experts`, one row per step, layer that has experts, and expert. They are written as numbered
parts (`steps-0001.parquet`), which `merge` turns into one file (`steps.parquet`). In the files a null means "not
measured at this step" and a NaN means "measured, and not a number".
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from muonlab.errors import MuonlabError, unknown_name
from muonlab.record.files import write_atomic

if TYPE_CHECKING:
    import torch

SCALARS = (
    "tokens",
    "flops",
    "seconds",
    "train_loss",
    "lr",
    "grad_norm",
    "probe_loss",
    "val_loss",
)
"""Columns that every `steps` frame has, first and in this order, measured or not."""
HEADS = {
    "max_logit": "value",
    "max_logit_abs": "value_abs",
    "exact": "exact",
    "gamma": "gamma",
    "entropy": "entropy",
    "one_hot": "one_hot",
}
"""What may be recorded per layer and head, and its column in `max_logits`. `exact` is bool: whether both values are the
maxima themselves, or both upper bounds; they are exact wherever nothing else was said."""
KEYS = {"steps": ("step",), "max_logits": ("step", "layer", "head"), "experts": ("step", "layer", "expert")}
"""The columns that identify a row of each trace."""
COLUMNS = {"steps": SCALARS, "max_logits": tuple(HEADS.values()), "experts": ("load",)}
"""The other columns that every frame of a trace has, first and in this order, measured or not."""


class TraceWriter:
    """Buffers rows and writes them under `folder`; the only writer of that folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._buffer: dict[int, dict[str, dict[Any, Any]]] = {}

    def append(
        self,
        step: int,
        scalars: Mapping[str, "float | torch.Tensor"],
        heads: Mapping[str, "torch.Tensor"] | None = None,
        loads: Mapping[int, "torch.Tensor"] | None = None,
    ) -> None:
        """Remember one step's values: scalars, per-head values of shape (layers, heads), and the load of every
        expert, (experts,), by the number of the layer.

        Keeps detached references and asks the device for nothing, so the tensors must not be written in place
        before the next `flush`. A second call for the same step adds columns to its row. Raises MuonlabError
        for an unknown name in `heads`.
        """
        row = self._buffer.get(step)
        if row is None:
            row = self._buffer[step] = {name: {} for name in KEYS}
        for name, value in scalars.items():
            row["steps"][name] = value.detach() if hasattr(value, "detach") else value
        for name, value in (heads or {}).items():
            if name not in HEADS:
                raise unknown_name("per-head quantity", name, HEADS)
            row["max_logits"][name] = value.detach()
        for layer, load in (loads or {}).items():
            row["experts"][layer] = load.detach()

    def flush(self) -> tuple[pa.Table, pa.Table] | None:
        """Write the buffered rows as one part of each trace and return the tables of `steps` and `max_logits`;
        None if there were no rows. Waits for the device once for each dtype."""
        if not self._buffer:
            return None
        order = sorted(self._buffer)
        steps, heads, experts = (
            table(order, [self._buffer[step][name] for step in order])
            for name, table in (
                ("steps", _steps_table),
                ("max_logits", _heads_table),
                ("experts", _loads_table),
            )
        )
        for name, table in (("max_logits", heads), ("experts", experts), ("steps", steps)):
            if table.num_rows:
                self._write(name, self._next(name), table)
        self._buffer.clear()
        return steps, heads

    def truncate(self, step: int) -> None:
        """Drop every row after `step`, from the buffer and from the files."""
        self._buffer = {key: row for key, row in self._buffer.items() if key <= step}
        for name in KEYS:
            for path in _files(self.folder, name):
                table = _read(path, name)
                kept = table.filter(pc.field("step") <= step)
                if kept.num_rows == 0:
                    path.unlink()
                elif kept.num_rows < table.num_rows:
                    self._write(name, path, kept)

    def merge(self) -> None:
        """Turn the parts of each trace into one file. A kill in between leaves both, which reads the same."""
        for name in KEYS:
            files = _files(self.folder, name)
            whole = self.folder / f"{name}.parquet"
            if files and files != [whole]:
                self._write(name, whole, read_trace(self.folder, name))
                for path in files:
                    if path != whole:
                        path.unlink()

    def _next(self, name: str) -> Path:
        last = max(_parts(self.folder, name), default=0)
        return self.folder / f"{name}-{last + 1:04d}.parquet"

    def _write(self, name: str, path: Path, table: pa.Table) -> None:
        write_atomic(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_trace(folder: Path, name: str) -> pa.Table:
    """The rows of the trace `name` (one of KEYS) from its merged file and its parts, sorted, each row once: where
    a row was written twice, every column has its last measured value."""
    keys = list(KEYS[name])
    for _ in range(10):
        try:
            tables = [_read(path, name) for path in _files(folder, name)]
            break
        except FileNotFoundError:  # the run was finishing while we read: its parts have just been merged
            continue
    else:
        raise MuonlabError(f"the trace {name} in {folder} changes whenever it is read; try again")
    empty = empty_trace(name)
    table = pa.concat_tables([empty, *tables], promote_options="default")
    table = table.select([*empty.column_names, *sorted(set(table.column_names) - set(empty.column_names))])
    ends = [(pc.min(part["step"]).as_py(), pc.max(part["step"]).as_py()) for part in tables]
    if any(first <= last for (_, last), (first, _) in pairwise(ends)):
        values = [column for column in table.column_names if column not in keys]
        table = table.group_by(keys, use_threads=False).aggregate([(column, "last") for column in values])
        table = table.rename_columns([c.removesuffix("_last") for c in table.column_names])
        table = table.select([*keys, *values]).sort_by([(key, "ascending") for key in keys])
    if "exact" in table.column_names:  # records from before there were bounds do not say it
        place = table.column_names.index("exact")
        table = table.set_column(place, "exact", pc.fill_null(table["exact"], True))
    return table.combine_chunks()


def _read(path: Path, name: str) -> pa.Table:
    """The rows of one file. Raises MuonlabError for one that is no such trace."""
    try:
        table = pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise MuonlabError(f"the trace {path} is damaged: {' '.join(str(error).split())}") from error
    if lost := [key for key in KEYS[name] if key not in table.column_names]:
        raise MuonlabError(f"the trace {path} is damaged: it has no column {lost[0]}")
    return table


def empty_trace(name: str) -> pa.Table:
    """A trace without rows, with the columns that it always has."""
    keys = [(key, pa.int64()) for key in KEYS[name]]
    return pa.schema(keys + [(column, _type(column)) for column in COLUMNS[name]]).empty_table()


def _type(column: str) -> pa.DataType:
    return pa.bool_() if column == "exact" else pa.float64()


def _files(folder: Path, name: str) -> list[Path]:
    # The parts are listed first: a merge writes the whole file before it removes them.
    parts = [path for _, path in sorted(_parts(folder, name).items())]
    whole = folder / f"{name}.parquet"
    return [whole, *parts] if whole.exists() else parts


def _parts(folder: Path, name: str) -> dict[int, Path]:
    numbered = [(path.stem.removeprefix(f"{name}-"), path) for path in folder.glob(f"{name}-*.parquet")]
    return {int(number): path for number, path in numbered if number.isdecimal()}


def _steps_table(order: list[int], rows: list[dict[str, Any]]) -> pa.Table:
    values = _to_float64([value for row in rows for value in row.values()])
    names = sorted({name for row in rows for name in row})
    column = {name: np.zeros(len(rows)) for name in names}
    missing = {name: np.ones(len(rows), dtype=bool) for name in names}
    flat = iter(values)
    for index, row in enumerate(rows):
        for name in row:
            column[name][index] = next(flat)
            missing[name][index] = False
    arrays = {name: pa.array(column[name], mask=missing[name], from_pandas=False) for name in names}
    return pa.table({"step": pa.array(order, pa.int64()), **arrays})


def _to_float64(values: list[Any]) -> np.ndarray:
    """Numbers and 0-dim tensors as float64, with one copy from each device and dtype."""
    result = np.empty(len(values))
    tensors: dict[tuple[Any, Any], list[int]] = {}
    for index, value in enumerate(values):
        if hasattr(value, "detach"):
            tensors.setdefault((value.device, value.dtype), []).append(index)
        else:
            result[index] = value
    for places in tensors.values():
        import torch

        stacked = torch.stack([values[index].reshape(()) for index in places])
        result[places] = stacked.cpu().double().numpy()
    return result


def _stack_heads(order: list[int], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Masked arrays (rows, layers, heads) of the rows that have per-head values; `step` is (rows,)."""
    rows_with = [(step, row) for step, row in zip(order, rows, strict=True) if row]
    if not rows_with:
        return {}
    import torch

    stacked = {"step": np.array([step for step, _ in rows_with])}
    for name in HEADS:
        have = [index for index, (_, row) in enumerate(rows_with) if name in row]
        if have:
            tensors = torch.stack([rows_with[index][1][name] for index in have]).cpu().double().numpy()
            stacked[name] = np.ma.masked_all((len(rows_with), *tensors.shape[1:]))
            stacked[name][have] = tensors
    if "max_logit" in stacked:
        exact = np.ma.array(np.ones_like(stacked["max_logit"]), mask=np.ma.getmaskarray(stacked["max_logit"]))
        said = stacked.get("exact", exact)
        stacked["exact"] = np.ma.where(np.ma.getmaskarray(said), exact, said)
    return stacked


def _heads_table(order: list[int], rows: list[dict[str, Any]]) -> pa.Table:
    """Tidy rows, sorted by step, layer and head."""
    stacked = _stack_heads(order, rows)
    if not stacked:
        return empty_trace("max_logits")
    shape = next(values.shape for name, values in stacked.items() if name != "step")
    columns = _grid("max_logits", stacked["step"], np.arange(shape[1]), np.arange(shape[2]))
    for name, column in HEADS.items():
        if name in stacked:
            values = stacked[name]
            columns[column] = pa.array(
                values.data.ravel(), mask=np.ma.getmaskarray(values).ravel(), from_pandas=False
            ).cast(_type(column))
    return pa.table(columns)


def _loads_table(order: list[int], rows: list[dict[int, Any]]) -> pa.Table:
    """Tidy rows, sorted by step, layer and expert."""
    by_step = {step: row for step, row in zip(order, rows, strict=True) if row}
    if not by_step:
        return empty_trace("experts")
    import torch

    layers = sorted(next(iter(by_step.values())))
    loads = torch.stack([row[layer] for row in by_step.values() for layer in layers]).cpu().double().numpy()
    columns = _grid("experts", np.array(list(by_step)), np.array(layers), np.arange(loads.shape[1]))
    return pa.table({**columns, "load": loads.ravel()})


def _grid(trace: str, *places: np.ndarray) -> dict[str, np.ndarray]:
    """The key columns of a trace that has a row at every combination of places."""
    every = np.meshgrid(*places, indexing="ij")
    return {key: place.ravel() for key, place in zip(KEYS[trace], every, strict=True)}


def chart_rows(steps: pa.Table, heads: pa.Table) -> list[dict[str, float]]:
    """What a chart shows of the two traces: a dict a step of its measured scalars and, over the heads of each
    layer, the largest `max_logit/layer_00`, where that head's is exact, and the means `entropy/layer_00` and
    `one_hot/layer_00`; `gamma` is the smallest over all layers and heads (1: nothing was clipped)."""
    rows = {
        row["step"]: {name: value for name, value in row.items() if value is not None}
        for row in steps.to_pylist()
    }
    for name, reduce, by_layer in (
        ("max_logit", np.maximum, True),
        ("entropy", np.add, True),
        ("one_hot", np.add, True),
        ("gamma", np.minimum, False),
    ):
        column = heads[HEADS[name]] if HEADS[name] in heads.column_names else None
        if column is None or column.null_count == len(column):
            continue
        kept = heads.filter(column.is_valid())
        step, layer, value = (kept[key].to_numpy() for key in ("step", "layer", HEADS[name]))
        new = (np.diff(step) != 0) | (by_layer & (np.diff(layer) != 0))
        starts = np.r_[0, 1 + np.flatnonzero(new)]
        values = reduce.reduceat(value, starts)
        if reduce is np.add:
            values = values / np.diff(np.r_[starts, len(value)])
        if name == "max_logit" and "exact" in kept.column_names:
            known = np.where(kept["exact"].to_numpy(), value, -np.inf)
            shown = ~(np.maximum.reduceat(known, starts) < values)  # NaN is shown too
            starts, values = starts[shown], values[shown]
        for start, reduced in zip(starts.tolist(), values.tolist(), strict=True):
            row = rows.setdefault(int(step[start]), {"step": int(step[start])})
            row[f"{name}/layer_{layer[start]:02d}" if by_layer else name] = reduced
    return [rows[step] for step in sorted(rows)]
