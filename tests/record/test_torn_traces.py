import errno
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record import RunRecord, load_run, parts
from muonlab.record.__main__ import main
from muonlab.record.parts import TornTrace, set_aside_torn
from muonlab.record.stream import read_trace, whole_until
from muonlab.record.trace import TraceWriter


def zeros_in_the_middle(content):
    third = len(content) // 3
    return content[:third] + bytes(third) + content[2 * third :]


DAMAGE = {
    "no byte": lambda content: b"",
    "its first half": lambda content: content[: len(content) // 2],
    "no end": lambda content: content[:-6],
    "a hole": lambda content: content[: len(content) // 3] + content[len(content) // 2 :],
    "zeros": zeros_in_the_middle,
    "garbage": lambda content: np.random.default_rng(0).bytes(len(content)),
}


@pytest.fixture
def folder(tmp_path, append_steps):
    """Three parts of four steps each, of a run that was killed."""
    writer = TraceWriter(tmp_path / "traces")
    for first in (0, 4, 8):
        append_steps(writer, range(first, first + 4))
        writer.flush()
    return tmp_path / "traces"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("trace", "part"), [("steps", 1), ("steps", 3), ("max_logits", 2)])
def test_a_torn_part_is_kept_aside_and_the_trace_is_rebuilt_from_before_it(
    folder, tmp_path, append_steps, trace, part, damage
):
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    TraceWriter(whole).merge()

    path = folder / f"{trace}-{part:04d}.parquet"
    torn = DAMAGE[damage](path.read_bytes())
    path.write_bytes(torn)
    with pytest.raises(TornTrace, match=rf"{path.name} is damaged: .*force=true"):
        read_trace(folder, trace)
    others = {other.name for other in folder.iterdir()} - {path.name}

    assert set_aside_torn(folder) == [path.with_name(f"{path.name}.torn")]
    assert path.with_name(f"{path.name}.torn").read_bytes() == torn
    assert {other.name for other in folder.iterdir()} == others | {f"{path.name}.torn"}
    until = whole_until(folder)
    assert until == 4 * (part - 1) - 1

    writer = TraceWriter(folder)
    writer.truncate(until)
    append_steps(writer, range(until + 1, 12))
    writer.flush()
    assert whole_until(folder) == 11
    writer.merge()
    for name in ("steps.parquet", "max_logits.parquet"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"layer": [0], "head": [0]}, "no column step"),
        ({"step": [0.5], "layer": [0], "head": [0]}, "column step is double"),
        ({"step": [0], "layer": [0], "head": [0], "value": ["high"]}, "column value is string"),
        ({"step": [0], "layer": pa.array([None], pa.int64()), "head": [0]}, "rows without a place"),
    ],
)
def test_a_file_with_other_columns_is_not_a_trace(folder, columns, why):
    path = folder / "max_logits-0002.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(TornTrace, match=why):
        read_trace(folder, "max_logits")
    assert [aside.name for aside in set_aside_torn(folder)] == [f"{path.name}.torn"]


@pytest.mark.parametrize(("part", "until"), [(1, -1), (2, 3), (3, 7)])
@pytest.mark.parametrize("trace", ["steps", "max_logits"])
def test_a_part_that_is_gone_is_a_hole(folder, trace, part, until):
    assert whole_until(folder) == 11
    (folder / f"{trace}-{part:04d}.parquet").unlink()
    assert whole_until(folder) == until


def test_a_trace_of_torn_files_alone_has_no_whole_step(folder):
    for path in folder.glob("max_logits-*.parquet"):
        path.write_bytes(b"")
    assert len(set_aside_torn(folder)) == 3
    assert whole_until(folder) == -1
    assert whole_until(folder / "nothing") == -1


def test_what_is_torn_twice_is_kept_twice(folder):
    path = folder / "steps-0003.parquet"
    for content in (b"first", b"second"):
        path.write_bytes(content)
        set_aside_torn(folder)
    assert path.with_name("steps-0003.parquet.torn").read_bytes() == b"first"
    assert path.with_name("steps-0003.parquet.torn-2").read_bytes() == b"second"


@pytest.mark.parametrize(
    "fault", [OSError(errno.EIO, "Input/output error"), pa.ArrowMemoryError("malloc failed")]
)
def test_a_file_that_cannot_be_read_just_now_is_not_torn(folder, monkeypatch, fault):
    def refuse(*given, **named):
        raise fault

    monkeypatch.setattr(parts.pq, "read_metadata", refuse)
    before = sorted(folder.iterdir())
    with pytest.raises(EnvironmentFault, match=r"cannot read .*max_logits|cannot read .*steps"):
        set_aside_torn(folder)
    assert sorted(folder.iterdir()) == before


def test_every_reader_of_a_finished_run_says_which_file_is_torn(tmp_path, config, append_steps):
    from analysis.frames import collect

    record = RunRecord.create(tmp_path / "run", config | {"model": {}}, [], {})
    append_steps(record, range(60))
    record.finish("finished")
    for name, readers in {
        "steps": [lambda run: run.steps, lambda run: run.events, lambda run: run.spike_scores],
        "max_logits": [lambda run: run.max_logits, lambda run: list(run.stream("max_logits"))],
    }.items():
        path = record.folder / "traces" / f"{name}.parquet"
        content = path.read_bytes()
        path.write_bytes(zeros_in_the_middle(content))
        commands = [lambda: collect([record.folder])]
        commands += [lambda: main([str(record.folder)])] if name == "steps" else []
        for read in [*(lambda r=r: r(load_run(record.folder)) for r in readers), *commands]:
            with pytest.raises(MuonlabError, match=rf"{name}\.parquet is damaged: .*force=true"):
                read()
        path.write_bytes(content)
    assert len(load_run(record.folder).max_logits) == 60 * 6
