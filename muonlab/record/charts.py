"""The rows that charts show of a run's traces."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from muonlab.record.columns import HEADS
from muonlab.record.parts import first_row, schema_of
from muonlab.record.stream import stream_trace

STEPS = 1000
"""The most steps in one list."""


def chart_parts(folder: Path, after: int = -1) -> Iterator[list[dict[str, float]]]:
    """`chart_rows` of the steps after `after` that are on disk in `folder`, in order, as lists of at most STEPS steps:
    memory does not grow with the length of the run."""
    steps, heads = _Ahead(folder, "steps", after), _Ahead(folder, "max_logits", after)
    while held := [ahead.rows["step"] for ahead in (steps, heads) if len(ahead.rows)]:
        last = min(column[-1].as_py() for column in held)
        last = min(last, min(column[0].as_py() for column in held) + STEPS - 1)
        yield chart_rows(steps.take(last), heads.take(last))


REDUCTIONS = {"max": np.maximum, "min": np.minimum, "mean": np.add}


def chart_rows(steps: pa.Table, heads: pa.Table) -> list[dict[str, float]]:
    """The charted values of the two traces, one dict per step: its measured scalars and, over the heads of each
    layer, the largest `max_logit/layer_00`, where it is exact, and the means `entropy/layer_00` and
    `one_hot/layer_00`; `gamma` is the smallest over all layers and heads (1: nothing was clipped)."""
    rows = {
        row["step"]: {name: value for name, value in row.items() if value is not None}
        for row in steps.to_pylist()
    }
    for name, head in HEADS.items():
        charted = head.chart is not None and head.column in heads.column_names
        column = heads[head.column] if charted else None
        if column is None or column.null_count == len(column):
            continue
        kept = heads.filter(column.is_valid())
        step, layer, value = (kept[key].to_numpy() for key in ("step", "layer", head.column))
        new = (np.diff(step) != 0) | (head.by_layer & (np.diff(layer) != 0))
        starts = np.r_[0, 1 + np.flatnonzero(new)]
        values = REDUCTIONS[head.reduction].reduceat(value, starts)
        if head.reduction == "mean":
            values = values / np.diff(np.r_[starts, len(value)])
        if name == "max_logit" and "exact" in kept.column_names:
            known = np.where(kept["exact"].to_numpy(), value, -np.inf)
            shown = ~(np.maximum.reduceat(known, starts) < values)  # NaN is shown too
            starts, values = starts[shown], values[shown]
        for start, reduced in zip(starts.tolist(), values.tolist(), strict=True):
            row = rows.setdefault(int(step[start]), {"step": int(step[start])})
            row[f"{name}/layer_{layer[start]:02d}" if head.by_layer else name] = reduced
    return [rows[step] for step in sorted(rows)]


class _Ahead:
    """The next rows of a trace; none at its end."""

    def __init__(self, folder: Path, name: str, after: int):
        self._tables = stream_trace(folder, name, after=after)
        self.rows = next(self._tables, schema_of(name, []).empty_table())

    def take(self, last: int) -> pa.Table:
        """Remove and return the rows up to the step `last`."""
        place = first_row(self.rows, last + 1)
        taken, self.rows = self.rows.slice(0, place), self.rows.slice(place)
        if not len(self.rows):
            self.rows = next(self._tables, self.rows)
        return taken
