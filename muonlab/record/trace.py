"""Writing the traces of a run at full resolution: a buffer that never waits for the device, and Parquet files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import pyarrow as pa

from muonlab.errors import unknown_name
from muonlab.record.columns import HEADS
from muonlab.record.parts import (
    KEYS,
    TraceFile,
    column_type,
    first_row,
    numbered_parts,
    schema_of,
    trace_files,
    write_trace,
)
from muonlab.record.stream import stream_trace

if TYPE_CHECKING:
    import torch


class Row(TypedDict):
    """The buffered values of one step: scalars by name, (layers, heads) by name, and (experts,) by layer."""

    steps: "dict[str, float | torch.Tensor]"
    max_logits: "dict[str, torch.Tensor]"
    experts: "dict[int, torch.Tensor]"


BUFFERED = 1000
"""The most steps held in memory, however far apart checkpoints are."""


class TraceWriter:
    """Buffers rows and writes them under `folder`; the only writer of that folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._buffer: dict[int, Row] = {}

    def append(
        self,
        step: int,
        scalars: Mapping[str, "float | torch.Tensor"],
        heads: Mapping[str, "torch.Tensor"] | None = None,
        loads: Mapping[int, "torch.Tensor"] | None = None,
    ) -> None:
        """Remember one step's values: scalars, per-head values of shape (layers, heads), and the load of every
        expert, (experts,), by the number of the layer.

        Keeps detached references and does not wait for the device, so the tensors must not be written in place
        before the next `flush`. When BUFFERED steps are held, the next one flushes them first. A second call for
        the same step adds columns to its row. Raises MuonlabError for an unknown name in `heads`.
        """
        row = self._buffer.get(step)
        if row is None:
            if len(self._buffer) == BUFFERED:
                self.flush()
            row = self._buffer[step] = Row(steps={}, max_logits={}, experts={})
        for name, value in scalars.items():
            row["steps"][name] = value.detach() if hasattr(value, "detach") else float(value)
        for name, value in (heads or {}).items():
            if name not in HEADS:
                raise unknown_name("per-head quantity", name, HEADS)
            row["max_logits"][name] = value.detach()
        for layer, load in (loads or {}).items():
            row["experts"][layer] = load.detach()

    def flush(self) -> None:
        """Write the buffered rows as one part of each trace. Waits for the device once per dtype."""
        order = sorted(self._buffer)
        rows = [self._buffer[step] for step in order]
        for name, table in (
            ("max_logits", _heads_table(order, [row["max_logits"] for row in rows])),
            ("experts", _loads_table(order, [row["experts"] for row in rows])),
            ("steps", _steps_table(order, [row["steps"] for row in rows])),
        ):
            if table is not None:
                last = max(numbered_parts(self.folder, name), default=0)
                write_trace(self.folder / f"{name}-{last + 1:04d}.parquet", [table], table.schema)
        self._buffer.clear()

    def truncate(self, step: int) -> None:
        """Drop every row after `step` from the buffer and the files; only files with rows on both sides are read."""
        self._buffer = {key: row for key, row in self._buffer.items() if key <= step}
        for name in KEYS:
            for path in trace_files(self.folder, name):
                file = TraceFile.read(path, name)
                if all(group.first > step for group in file.groups):
                    path.unlink()
                elif any(group.last > step for group in file.groups):
                    write_trace(path, _until(step, file), schema_of(name, [file]))

    def merge(self) -> None:
        """Turn the parts of each trace into one file. A kill in between leaves both, which read the same."""
        for name in KEYS:
            files = trace_files(self.folder, name)
            whole = self.folder / f"{name}.parquet"
            if files and files != [whole]:
                schema = schema_of(name, [TraceFile.read(path, name) for path in files])
                write_trace(whole, stream_trace(self.folder, name), schema)
                for path in files:
                    if path != whole:
                        path.unlink()


def _until(step: int, file: TraceFile) -> Iterator[pa.Table]:
    """The rows of a file up to a step."""
    for group in file.groups:
        if group.first <= step:
            table = file.rows(group, schema_of(file.name, [file]))
            yield table.slice(0, first_row(table, step + 1))


def _steps_table(order: list[int], rows: "list[dict[str, float | torch.Tensor]]") -> pa.Table | None:
    """One row per step; None without rows."""
    if not rows:
        return None
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


def _to_float64(values: "list[float | torch.Tensor]") -> np.ndarray:
    """Numbers and 0-dim tensors as float64, with one copy from each device and dtype."""
    result = np.empty(len(values))
    tensors: dict[tuple[torch.device, torch.dtype], dict[int, torch.Tensor]] = {}
    for index, value in enumerate(values):
        if isinstance(value, float):
            result[index] = value
        else:
            tensors.setdefault((value.device, value.dtype), {})[index] = value.reshape(())
    for places in tensors.values():
        result[[*places]] = _stacked([*places.values()])
    return result


def _stacked(tensors: "list[torch.Tensor]") -> np.ndarray:
    """Tensors of one shape, device and dtype as one float64 array, with one copy from the device."""
    import torch

    return torch.stack(tensors).cpu().double().numpy()


def _stack_heads(order: list[int], rows: "list[dict[str, torch.Tensor]]") -> dict[str, np.ndarray]:
    """Masked arrays (rows, layers, heads) of the rows that have per-head values; `step` is (rows,)."""
    rows_with = [(step, row) for step, row in zip(order, rows, strict=True) if row]
    if not rows_with:
        return {}
    stacked = {"step": np.array([step for step, _ in rows_with])}
    for name in HEADS:
        have = [index for index, (_, row) in enumerate(rows_with) if name in row]
        if have:
            tensors = _stacked([rows_with[index][1][name] for index in have])
            stacked[name] = np.ma.masked_all((len(rows_with), *tensors.shape[1:]))
            stacked[name][have] = tensors
    if "max_logit" in stacked:
        exact = np.ma.array(np.ones_like(stacked["max_logit"]), mask=np.ma.getmaskarray(stacked["max_logit"]))
        recorded = stacked.get("exact", exact)
        stacked["exact"] = np.ma.where(np.ma.getmaskarray(recorded), exact, recorded)
    return stacked


def _heads_table(order: list[int], rows: "list[dict[str, torch.Tensor]]") -> pa.Table | None:
    """Tidy rows, sorted by step, layer and head; None without rows."""
    stacked = _stack_heads(order, rows)
    if not stacked:
        return None
    shape = next(values.shape for name, values in stacked.items() if name != "step")
    columns = _grid("max_logits", stacked["step"], np.arange(shape[1]), np.arange(shape[2]))
    for name, head in HEADS.items():
        if name in stacked:
            values = stacked[name]
            columns[head.column] = pa.array(
                np.ma.getdata(values).ravel(), mask=np.ma.getmaskarray(values).ravel(), from_pandas=False
            ).cast(column_type("max_logits", head.column))
    return pa.table(columns)


def _loads_table(order: list[int], rows: "list[dict[int, torch.Tensor]]") -> pa.Table | None:
    """Tidy rows, sorted by step, layer and expert; None without rows."""
    by_step = {step: row for step, row in zip(order, rows, strict=True) if row}
    if not by_step:
        return None
    layers = sorted(next(iter(by_step.values())))
    loads = _stacked([row[layer] for row in by_step.values() for layer in layers])
    columns = _grid("experts", np.array(list(by_step)), np.array(layers), np.arange(loads.shape[1]))
    return pa.table({**columns, "load": loads.ravel()})


def _grid(trace: str, *places: np.ndarray) -> dict[str, np.ndarray]:
    """The key columns of a trace that has a row at every combination of places."""
    every = np.meshgrid(*places, indexing="ij")
    return {key: place.ravel() for key, place in zip(KEYS[trace], every, strict=True)}
