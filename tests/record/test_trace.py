import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.errors import MuonlabError
from muonlab.record import stream
from muonlab.record.charts import chart_parts
from muonlab.record.columns import HEADS, SCALARS
from muonlab.record.stream import read_trace
from muonlab.record.trace import TraceWriter


def frames(folder):
    return tuple(read_trace(folder, name).to_pandas() for name in ("steps", "max_logits"))


def charted(folder):
    return [row for rows in chart_parts(folder) for row in rows]


def assert_identical(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_append_never_touches_a_value(tmp_path):
    # A meta tensor has no data: whatever read it, waited for it or copied it would raise.
    writer = TraceWriter(tmp_path)
    nothing = torch.empty((), device="meta", requires_grad=True)
    writer.append(0, {"train_loss": nothing, "lr": 0.1}, {"max_logit": torch.empty(2, 3, device="meta")})
    kept = writer._buffer[0]["steps"]["train_loss"]
    assert not kept.requires_grad  # the graph of the step can be freed
    with pytest.raises((NotImplementedError, RuntimeError)):
        writer.flush()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_float32_values_come_back_to_the_last_bit(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("trace")
    writer = TraceWriter(folder)
    for step, value in enumerate(values):
        tensor = torch.tensor(value, dtype=torch.float32)
        writer.append(step, {"train_loss": tensor}, {"max_logit": tensor.expand(1, 2)})
    writer.flush()
    steps, heads = frames(folder)
    np.testing.assert_array_equal(steps["train_loss"], np.float64(values))
    np.testing.assert_array_equal(heads["value"], np.repeat(np.float64(values), 2))


def test_tensors_of_every_dtype_and_numbers_share_a_column(tmp_path):
    writer = TraceWriter(tmp_path)
    exact = [torch.tensor(1.5, dtype=d) for d in (torch.float64, torch.bfloat16, torch.float16)]
    for step, value in enumerate([*exact, torch.tensor(3), torch.tensor([2.5]), 7, 0.1, np.float32(0.5)]):
        writer.append(step, {"train_loss": value})
    writer.flush()
    assert frames(tmp_path)[0]["train_loss"].tolist() == [1.5, 1.5, 1.5, 3.0, 2.5, 7.0, 0.1, 0.5]


def test_infinite_nan_and_not_measured_are_three_things(tmp_path):
    writer = TraceWriter(tmp_path)
    values = [math.inf, -math.inf, math.nan]
    for step, value in enumerate(values):
        writer.append(step, {"train_loss": torch.tensor(value)}, {"max_logit": torch.full((1, 1), value)})
    writer.append(3, {"val_loss": 1.0}, {"entropy": torch.ones(1, 1)})
    writer.flush()
    writer.merge()
    for name, column in (("steps", "train_loss"), ("max_logits", "value")):
        stored = pq.read_table(tmp_path / f"{name}.parquet")[column]
        np.testing.assert_array_equal(stored.to_numpy()[:3], values)
        assert stored.is_valid().to_pylist() == [True, True, True, False]


def test_heads_are_tidy_and_may_miss_quantities(tmp_path):
    writer = TraceWriter(tmp_path)
    logits = torch.arange(6.0).reshape(2, 3)
    writer.append(4, {}, {"max_logit": logits})
    writer.append(5, {}, {"max_logit": logits, "entropy": -logits})
    writer.append(6, {"lr": 1.0})
    writer.flush()
    _, heads = frames(tmp_path)
    assert heads.columns.tolist() == ["step", "layer", "head", *(head.column for head in HEADS.values())]
    row = heads.set_index(["step", "layer", "head"]).loc[(5, 1, 2)]
    assert (row["value"], row["entropy"]) == (5.0, -5.0)
    assert heads["step"].tolist() == [4] * 6 + [5] * 6
    assert heads["entropy"].isna().tolist() == [True] * 6 + [False] * 6
    assert heads["gamma"].isna().all()


def test_each_row_says_whether_its_maxima_are_exact(tmp_path):
    """Exact unless recorded otherwise, by this writer or by one older than the bounds; later columns are added."""
    writer = TraceWriter(tmp_path)
    logits = torch.ones(1, 2)
    writer.append(0, {}, {"max_logit": logits})
    writer.append(1, {}, {"max_logit": logits, "exact": torch.tensor([[False, True]])})
    writer.append(2, {}, {"max_logit": logits})
    writer.flush()
    writer.append(1, {}, {"entropy": logits})
    writer.flush()
    for _ in range(2):
        exact = frames(tmp_path)[1]["exact"]
        assert exact.dtype == bool
        assert exact.tolist() == [True, True, False, True, True, True]
        writer.merge()
    stored = pq.read_table(tmp_path / "max_logits.parquet").drop_columns(["exact", "one_hot"])
    pq.write_table(stored, tmp_path / "max_logits.parquet")  # as an older version of this package left it
    heads = frames(tmp_path)[1]
    assert heads["exact"].tolist() == [True] * 6
    assert heads["one_hot"].isna().all()


def test_a_chart_shows_no_bound_as_a_maximum(tmp_path):
    writer = TraceWriter(tmp_path)
    logits, exact = torch.tensor([[1.0, 5.0], [6.0, 7.0]]), torch.tensor([[True, False], [False, True]])
    writer.append(0, {}, {"max_logit": logits, "exact": exact})
    writer.append(1, {}, {"max_logit": -logits, "exact": exact})
    writer.append(2, {}, {"max_logit": logits, "exact": torch.zeros(2, 2, dtype=torch.bool)})
    writer.flush()
    assert charted(tmp_path) == [
        {"step": 0, "max_logit/layer_01": 7.0},  # layer 0's largest may be anything up to 5
        {"step": 1, "max_logit/layer_00": -1.0},
        {"step": 2},
    ]


def test_expert_loads_are_a_trace_of_their_own(tmp_path):
    writer = TraceWriter(tmp_path)
    loads = torch.arange(6.0).reshape(2, 3) / 15
    for step in range(4):
        writer.append(
            step, {"train_loss": 1.0}, {"max_logit": torch.ones(2, 1)}, {1: loads[0], 3: loads[1] + step}
        )
        if step % 2:
            writer.flush()
    writer.truncate(2)
    for _ in range(2):
        experts = read_trace(tmp_path, "experts").to_pandas()
        assert experts.columns.tolist() == ["step", "layer", "expert", "load"]
        assert len(experts) == 3 * 6
        row = experts.set_index(["step", "layer", "expert"]).loc[(2, 3, 0)]
        assert row["load"] == np.float32(3 / 15) + np.float32(2)
        writer.merge()


def test_a_misspelt_head_quantity_is_refused_at_once(tmp_path):
    with pytest.raises(MuonlabError, match="'max_logits'; did you mean 'max_logit'"):
        TraceWriter(tmp_path).append(0, {}, {"max_logits": torch.ones(1, 1)})


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 11), max_size=4),
    kill=st.integers(0, 11),
    back=st.integers(0, 11),
    merged=st.booleans(),
)
def test_any_flushes_and_any_resume_give_the_same_trace(
    tmp_path_factory, append_steps, cuts, kill, back, merged
):
    whole, cut = (tmp_path_factory.mktemp(name) for name in ("whole", "cut"))
    writer = TraceWriter(whole)
    append_steps(writer, range(12))
    writer.flush()
    writer.merge()

    writer = TraceWriter(cut)
    for step in range(kill):
        append_steps(writer, [step])
        if step in cuts:
            writer.flush()
    if merged:  # it ended as `interrupted`, else it was killed with rows in its buffer
        writer.flush()
        writer.merge()
    resumed = TraceWriter(cut)
    first = min(back, len(read_trace(cut, "steps")))  # a checkpoint never runs ahead of the trace
    resumed.truncate(first - 1)
    append_steps(resumed, range(first, 12))
    resumed.flush()
    assert_identical(frames(cut), frames(whole))
    resumed.merge()
    assert_identical(frames(cut), frames(whole))


def test_truncate_drops_rows_from_the_buffer_and_every_file(tmp_path, append_steps):
    writer = TraceWriter(tmp_path)
    for steps in (range(3), range(3, 6), range(6, 9)):
        append_steps(writer, steps)
        writer.flush()
    append_steps(writer, range(9, 11))
    writer.truncate(4)
    writer.flush()
    steps, heads = frames(tmp_path)
    assert steps["step"].tolist() == [0, 1, 2, 3, 4]
    assert sorted(heads["step"].unique()) == [0, 1, 2, 3, 4]
    assert len(list(tmp_path.glob("steps-*.parquet"))) == 2
    writer.truncate(-1)
    assert list(tmp_path.iterdir()) == []


def test_a_later_call_for_a_step_adds_to_its_row(tmp_path):
    writer = TraceWriter(tmp_path)
    writer.append(0, {"train_loss": 2.0}, {"max_logit": torch.ones(1, 2)})
    writer.append(0, {"grad_norm": 3.0})
    writer.append(1, {"train_loss": math.nan})
    writer.flush()
    writer.append(0, {"val_loss": 4.0}, {"entropy": torch.zeros(1, 2)})
    writer.append(1, {"val_loss": 5.0})
    writer.flush()
    for _ in range(2):
        steps, heads = frames(tmp_path)
        assert steps[["step", "train_loss", "grad_norm", "val_loss"]].iloc[0].tolist() == [0, 2.0, 3.0, 4.0]
        assert heads[["value", "entropy"]].to_numpy().tolist() == [[1.0, 0.0]] * 2
        assert read_trace(tmp_path, "steps")["train_loss"].is_valid().to_pylist() == [True, True]
        writer.merge()


def test_a_kill_during_merge_or_write_changes_nothing(tmp_path, append_steps):
    writer = TraceWriter(tmp_path)
    for steps in (range(3), range(3, 6)):
        append_steps(writer, steps)
        writer.flush()
    before = frames(tmp_path)
    parts = {path: path.read_bytes() for path in tmp_path.iterdir()}
    writer.merge()
    for path, content in parts.items():  # killed after the merged file, before its parts went
        path.write_bytes(content)
    (tmp_path / ".steps-0003.parquet.123.tmp").write_bytes(b"PAR1 half")
    assert_identical(frames(tmp_path), before)
    writer.merge()
    assert_identical(frames(tmp_path), before)
    assert not list(tmp_path.glob("steps-*.parquet"))


def test_columns_come_in_one_order_whatever_was_measured_first(tmp_path):
    writer = TraceWriter(tmp_path)
    writer.append(0, {"weight_rms/muon": 1.0, "val_loss": 1.0, "a": 0.0})
    writer.flush()
    writer.append(1, {"tokens": 64, "update_rms/muon": 1.0})
    writer.flush()
    columns = frames(tmp_path)[0].columns.tolist()
    assert columns == ["step", *SCALARS, "a", "update_rms/muon", "weight_rms/muon"]


def test_a_run_without_a_trace_has_empty_frames(tmp_path):
    steps, heads = frames(tmp_path / "traces")
    assert len(steps) == len(heads) == len(read_trace(tmp_path / "traces", "experts")) == 0
    assert steps.columns.tolist() == ["step", *SCALARS]
    TraceWriter(tmp_path).flush()
    assert list(tmp_path.iterdir()) == []


def test_chart_rows_reduce_heads_and_keep_what_was_measured(tmp_path):
    writer = TraceWriter(tmp_path)
    logits = torch.tensor([[1.0, 5.0], [-3.0, -2.0]])
    writer.append(
        0, {"train_loss": 2.0}, {"max_logit": logits, "gamma": torch.tensor([[1.0, 0.5], [1.0, 1.0]])}
    )
    writer.append(1, {"lr": 0.1}, {"max_logit": torch.tensor([[math.nan, 9.0], [math.inf, 0.0]])})
    writer.append(2, {}, {"entropy": torch.tensor([[1.0, 3.0], [0.0, 1.0]])})
    writer.flush()
    first, second, third = charted(tmp_path)
    assert first == {
        "step": 0,
        "train_loss": 2.0,
        "max_logit/layer_00": 5.0,
        "max_logit/layer_01": -2.0,
        "gamma": 0.5,
    }
    assert math.isnan(second.pop("max_logit/layer_00"))  # a NaN head is not hidden by a finite one
    assert second == {"step": 1, "lr": 0.1, "max_logit/layer_01": math.inf}
    assert third == {"step": 2, "entropy/layer_00": 2.0, "entropy/layer_01": 0.5}


def test_chart_rows_need_neither_heads_nor_steps(tmp_path):
    assert charted(tmp_path) == []


def test_a_run_that_ends_while_it_is_read_is_read_again(tmp_path, append_steps, monkeypatch):
    writer = TraceWriter(tmp_path)
    for steps in (range(3), range(3, 6)):
        append_steps(writer, steps)
        writer.flush()
    before = frames(tmp_path)
    list_files = stream.trace_files

    def listed_before_the_merge(folder, name):
        listed = list_files(folder, name)
        monkeypatch.setattr(stream, "trace_files", list_files)
        writer.merge()
        return listed

    monkeypatch.setattr(stream, "trace_files", listed_before_the_merge)
    assert_identical(frames(tmp_path), before)
