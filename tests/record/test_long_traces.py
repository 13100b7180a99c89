import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.errors import MuonlabError
from muonlab.record import load_run, parts, trace
from muonlab.record.charts import chart_parts
from muonlab.record.columns import SCALARS
from muonlab.record.parts import COLUMNS, KEYS
from muonlab.record.stream import read_trace, stream_trace
from muonlab.record.trace import TraceWriter

MEGABYTES = 60
"""How much more memory ten times the steps may take; five times took 148 to 251 more while traces were read whole."""

LONG = """
import sys
from pathlib import Path
import numpy as np
import pyarrow as pa
from muonlab.record.charts import chart_parts
from muonlab.record.load import _frames
from muonlab.record.parts import set_aside_torn, write_trace
from muonlab.record.score import SERIES, describe_spikes
from muonlab.record.stream import read_trace, stream_trace, whole_until
from muonlab.record.trace import TraceWriter

folder, count = Path(sys.argv[1]), int(sys.argv[2])
for part, first in enumerate(range(0, count, 500), 1):
    step, layer, head = (a.ravel() for a in np.meshgrid(range(first, first + 500), range(12), range(12), indexing="ij"))
    value = np.random.default_rng(first).random(len(step))
    heads = {"step": step, "layer": layer, "head": head, "value": value, "value_abs": value, "gamma": value}
    steps = {"step": step[::144], "train_loss": value[::144], "grad_norm": value[::144], "lr": value[::144]}
    for name, columns in (("max_logits", heads), ("steps", steps)):
        table = pa.table(columns)
        write_trace(folder / f"{name}-{part:04d}.parquet", [table], table.schema)

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024

assert set_aside_torn(folder) == []
assert whole_until(folder) == count - 1
writer = TraceWriter(folder)
writer.truncate(count - 11)
assert sum(map(len, chart_parts(folder))) == count - 10
resume = peak()
writer.merge()
describe_spikes(read_trace(folder, "steps", SERIES))
finish = peak()
assert sum(map(len, _frames("max_logits", stream_trace(folder, "max_logits")))) == 144 * (count - 10)
print(resume, finish, peak())
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read in /proc"
)
def test_resuming_finishing_and_loading_take_memory_that_does_not_grow_with_the_run(tmp_path):
    peaks = []
    for count in (1000, 10_000):
        command = [sys.executable, "-c", LONG, str(tmp_path / str(count)), str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(np.array(done.stdout.split(), dtype=int))
    assert (peaks[1] - peaks[0] < MEGABYTES).all(), peaks


VALUES = st.one_of(st.floats(width=32), st.just(float("nan")))
ROWS = st.dictionaries(st.sampled_from(["train_loss", "lr", "x", "y"]), VALUES, max_size=3)
OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 8), ROWS, st.booleans()),
    st.tuples(st.just("append"), st.integers(0, 8), ROWS, st.booleans()),
    st.tuples(st.just("flush")),
    st.tuples(st.just("truncate"), st.integers(-1, 8)),
    st.tuples(st.just("merge")),
)


class Oracle:
    """The traces as a dictionary, of what is on disk and of what is buffered."""

    def __init__(self):
        self.disk, self.buffer = {}, {}

    def append(self, step, scalars, heads):
        row = self.buffer.setdefault((step,), {})
        row.update(scalars)
        if heads:
            for head in range(3):
                self.buffer.setdefault((step, 0, head), {})["value"] = float(head + step)

    def flush(self):
        for key, row in self.buffer.items():
            self.disk.setdefault(key, {}).update(row)
        self.buffer = {}

    def truncate(self, step):
        self.disk = {key: row for key, row in self.disk.items() if key[0] <= step}
        self.buffer = {key: row for key, row in self.buffer.items() if key[0] <= step}

    def merge(self):
        """Changes nothing."""

    def rows(self, name):
        return {key: row for key, row in sorted(self.disk.items()) if len(key) == len(KEYS[name])}


@settings(deadline=None, max_examples=60)
@given(st.lists(OPERATIONS, max_size=25))
def test_any_schedule_leaves_what_a_dictionary_would(tmp_path_factory, operations):
    folder = tmp_path_factory.mktemp("trace")
    writer, oracle = TraceWriter(folder), Oracle()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ROWS", 4)  # one step's three heads, or four steps
        for name, *given_ in operations:
            if name == "append":
                step, scalars, heads = given_
                writer.append(step, scalars, {"max_logit": torch.arange(3.0)[None] + step} if heads else None)
            else:
                getattr(writer, name)(*given_)
            getattr(oracle, name)(*given_)
        for name in ("steps", "max_logits"):
            check(folder, name, oracle.rows(name))
        charted = [row for rows in chart_parts(folder) for row in rows]
        assert [row["step"] for row in charted] == sorted({key[0] for key in oracle.disk})
        late = [row for rows in chart_parts(folder, after=3) for row in rows]
        np.testing.assert_equal(late, [row for row in charted if row["step"] > 3])


def check(folder, name, rows):
    table = read_trace(folder, name)
    assert table.column_names[: len(KEYS[name])] == list(KEYS[name])
    assert list(zip(*(table[key].to_pylist() for key in KEYS[name]), strict=True)) == list(rows)
    for column in table.column_names[len(KEYS[name]) :]:
        expected = [row.get(column, True if column == "exact" else None) for row in rows.values()]
        np.testing.assert_equal(table[column].to_pylist(), expected)
    pieces = list(stream_trace(folder, name))
    assert all(len(piece) <= parts.ROWS for piece in pieces)
    ends = [(piece["step"][0].as_py(), piece["step"][-1].as_py()) for piece in pieces]
    assert all(last < first for (_, last), (first, _) in pairwise(ends))


def test_the_merged_file_has_its_columns_in_order_and_depends_on_the_rows_alone(
    tmp_path, append_steps, monkeypatch
):
    monkeypatch.setattr(parts, "ROWS", 13)  # two steps of six heads, and a row
    for folder, flushes in (("one", {11}), ("other", {0, 1, 4, 11})):
        writer = TraceWriter(tmp_path / folder)
        for step in range(12):
            append_steps(writer, [step])
            if step == 7:
                writer.append(step, {"z": 1.0, "a": 2.0})
            if step in flushes:
                writer.flush()
        writer.merge()
    for name, extra in (("steps", ["a", "z"]), ("max_logits", [])):
        one, other = (tmp_path / folder / f"{name}.parquet" for folder in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()
        schema = pq.read_schema(one)
        assert schema.names == [*KEYS[name], *COLUMNS[name], *extra]
        assert {str(schema.field(key).type) for key in KEYS[name]} == {"int64"}
        values = [column for column in schema.names[len(KEYS[name]) :] if column != "exact"]
        assert {str(schema.field(column).type) for column in values} == {"double"}
    footer = pq.read_metadata(tmp_path / "one" / "max_logits.parquet")
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [12] * 6


def test_files_of_before_there_were_row_groups_of_whole_steps_read_the_same(tmp_path, append_steps):
    writer = TraceWriter(tmp_path)
    append_steps(writer, range(10))
    writer.flush()
    before = read_trace(tmp_path, "max_logits")
    path = tmp_path / "max_logits-0001.parquet"
    old = pq.read_table(path).drop_columns("exact")
    pq.write_table(old, path, row_group_size=7)  # which ends in the middle of a step, and has no checksums
    assert read_trace(tmp_path, "max_logits").equals(before)


def test_no_more_than_so_many_steps_are_buffered(tmp_path, append_steps, monkeypatch):
    monkeypatch.setattr(trace, "BUFFERED", 3)
    writer = TraceWriter(tmp_path)
    append_steps(writer, range(8))
    assert read_trace(tmp_path, "steps")["step"].to_pylist() == list(range(6))
    writer.append(7, {"late": 1.0})  # a step that is buffered does not count again
    assert len(list(tmp_path.glob("steps-*.parquet"))) == 2
    writer.flush()
    assert read_trace(tmp_path, "steps")["step"].to_pylist() == list(range(8))


def test_truncating_reads_only_the_file_that_has_both_sides(tmp_path, append_steps):
    writer = TraceWriter(tmp_path)
    for first in (0, 4, 8):
        append_steps(writer, range(first, first + 4))
        writer.flush()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-0001.parquet")}
    files = []
    read = parts.TraceFile.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            parts.TraceFile, "rows", lambda self, *a: files.append(self.path.name) or read(self, *a)
        )
        writer.truncate(5)
    assert sorted(files) == ["max_logits-0002.parquet", "steps-0002.parquet"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sorted(path.name[-12:] for path in tmp_path.glob("steps-*")) == ["0001.parquet", "0002.parquet"]


def test_a_run_is_streamed_in_pieces_that_are_its_frame(record, append_steps, monkeypatch):
    monkeypatch.setattr(parts, "ROWS", 13)
    append_steps(record, range(9))
    record.finish("finished")
    run = load_run(record.folder)
    for name, frame in (("steps", run.steps), ("max_logits", run.max_logits)):
        pieces = list(run.stream(name))
        pd.testing.assert_frame_equal(pd.concat(pieces, ignore_index=True), frame, check_exact=True)
        assert all(len(piece) <= 13 for piece in pieces)
    assert (
        run.max_logits.dtypes.astype(str).tolist()
        == ["int32"] * 3 + ["float64"] * 2 + ["bool"] + ["float64"] * 3
    )
    [experts] = run.stream("experts")
    pd.testing.assert_frame_equal(experts, run.experts)
    assert experts.columns.tolist() == ["step", "layer", "expert", "load"]
    assert run.steps.columns.tolist()[1:] == list(SCALARS)
    with pytest.raises(MuonlabError, match="unknown trace 'heads'"):
        run.stream("heads")
