import math

import pytest
from mlflow_points import points

from muonlab.errors import MuonlabError
from muonlab.record.mlflow_run import METRICS_PER_REQUEST, metric_key
from muonlab.record.store import connect


def test_a_run_has_its_parameters_tags_and_name(store, begin, config):
    run = begin(config, {"study": "first", "seed": 1, "trial": None})
    kept = connect(store).get_run(run.run_id)
    assert kept.data.params == {
        "seed": "1",
        "optimizer.name": "muonclip",
        "optimizer.lr": "1e-05",
        "optimizer.tau": "30",
        "optimizer.betas": "[0.9, 0.95]",
        "optimizer.windows": "null",
        "trainer.max_steps": "700",
        "trainer.device": "cpu",
        "paths.runs": "somewhere",
    }
    assert kept.info.run_name == "muon-lr1e-2-s1"
    assert (kept.info.status, kept.data.tags["muonlab.status"]) == ("RUNNING", "running")
    assert (kept.data.tags["study"], kept.data.tags["seed"]) == ("first", "1")
    assert "trial" not in kept.data.tags


def test_many_long_and_odd_parameters_are_taken(store, begin):
    params = {f"key{i}": i for i in range(250)} | {"long": "x" * 7000, "k[0]@": 1, "a" * 300: 2, "none": {}}
    kept = connect(store).get_run(begin(params).run_id).data.params
    assert len(kept) == 254
    assert kept["long"] == "x" * 6000
    assert (kept["k_0__"], kept["a" * 250], kept["none"]) == ("1", "2", "{}")


def test_two_that_close_a_study_at_once_chart_its_curves_once(store, begin, tmp_path):
    folder = tmp_path / "study"
    both = [begin(folder=folder), begin(folder=folder)]
    for run in both:
        run.log_curve("loss [a, b]/muon+", {8: 3.0, 1: 2.5})
        run.log_curve("loss [a, b]/muon+", {1: 0.0})
    assert both[0].run_id == both[1].run_id
    assert points(store, both[0], "loss _a_ b_/muon_") == [(1, 2.5), (8, 3.0)]


def test_a_trial_lies_below_its_study(store, begin):
    study = begin()
    trial = begin(parent_run_id=study.run_id)
    tag = f"tags.mlflow.parentRunId = '{study.run_id}'"
    client = connect(store)
    tagged = client.search_runs([client.get_experiment_by_name("lab").experiment_id], tag)
    assert [run.info.run_id for run in tagged] == [trial.run_id]


def test_columns_are_where_a_reader_looks_for_them():
    assert [
        metric_key(name) for name in ("train_loss", "val_loss", "grad_norm", "max_logit/layer_03", "seconds")
    ] == [
        "loss/train",
        "loss/val",
        "optim/grad_norm",
        "max_logit/layer_03",
        "progress/seconds",
    ]
    assert metric_key("update_rms/query [h]") == "optim/update_rms/query _h_"


def test_every_step_of_a_loss_is_charted_and_the_rest_thinned(store, begin):
    run = begin()
    rows = [
        {"step": s, "train_loss": 1.0 * s, "max_logit/layer_00": 2.0 * s, "lr": 0.5, "seconds": 0.25 * s}
        for s in range(35)
    ]
    for row in rows[12::12]:
        row["entropy/layer_00"] = 3.0  # measured rarely: never thinned
    rows[15]["lr"] = math.inf  # never thinned either
    run.log_rows(rows[:20])
    run.log_rows(rows[20:])
    assert points(store, run, "loss/train") == [(s, s) for s in range(35)]
    assert points(store, run, "max_logit/layer_00") == [(s, 2 * s) for s in range(35)]
    rates = points(store, run, "optim/lr")
    assert [step for step, _ in rates] == [0, 10, 15, 20, 30]
    assert {value for step, value in rates if step != 15} == {0.5}
    assert points(store, run, "softmax/entropy/layer_00") == [(12, 3.0), (24, 3.0)]
    # The clock of a point is that of its step, not of the flush.
    history = connect(store).get_metric_history(run.run_id, "loss/train")
    first, last = (next(p.timestamp for p in history if p.step == step) for step in (0, 34))
    assert last - first == 8500


def test_more_rows_than_a_request_holds_arrive(store, begin):
    run = begin()
    run.log_rows({"step": s, "train_loss": 1.0, "grad_norm": 2.0} for s in range(METRICS_PER_REQUEST))
    assert (
        len(points(store, run, "loss/train"))
        == len(points(store, run, "optim/grad_norm"))
        == METRICS_PER_REQUEST
    )
    assert run.first_step == METRICS_PER_REQUEST - 1


def test_what_is_not_finite_is_flagged(store, begin):
    run = begin()
    rows = [{"step": s, "train_loss": 1.0, "lr": 0.1} for s in range(8)]
    rows[5] |= {"train_loss": math.inf, "lr": -math.inf}
    rows[7]["train_loss"] = math.nan
    run.log_rows(rows)
    assert points(store, run, "nonfinite") == [(5, 2.0), (7, 1.0)]
    loss = dict(points(store, run, "loss/train"))
    assert loss[5] > 1.7e308  # MLflow has no infinity
    assert math.isnan(loss[7])
    assert connect(store).get_run(run.run_id).data.tags["muonlab.nonfinite"] == "loss/train = inf at step 5"


@pytest.mark.parametrize(
    ("status", "theirs"),
    [
        ("finished", "FINISHED"),
        ("diverged", "FINISHED"),
        ("pruned", "KILLED"),
        ("interrupted", "KILLED"),
        ("out-of-memory", "FAILED"),
        ("failed", "FAILED"),
    ],
)
def test_every_status_has_one_of_mlflows(store, begin, status, theirs):
    run = begin()
    run.log_rows([{"step": 9, "train_loss": 1.0}])
    run.finish(status, "a cause", {"val_loss": 2.5})
    kept = connect(store).get_run(run.run_id)
    assert kept.info.status == theirs
    assert (kept.data.tags["muonlab.status"], kept.data.tags["muonlab.cause"]) == (status, "a cause")
    assert points(store, run, "result/val_loss") == [(9, 2.5)]


def test_an_unknown_ending_is_refused(begin):
    with pytest.raises(MuonlabError, match="unknown final status 'finish'; did you mean 'finished'"):
        begin().finish("finish")


def test_the_record_lies_in_the_artifacts_without_its_checkpoints(store, begin, record, append_steps):
    append_steps(record, range(3))
    record.finish("finished")
    (record.folder / "checkpoints").mkdir()
    (record.folder / "checkpoints" / "last.ckpt").write_text("large")
    (record.folder / ".half.tmp").write_text("")
    run = begin()
    run.log_folder(record.folder)
    client = connect(store)
    top = {entry.path for entry in client.list_artifacts(run.run_id)}
    assert top == {"config.yaml", "environment.json", "events.json", "routing.json", "status.json", "traces"}
    below = {entry.path for entry in client.list_artifacts(run.run_id, "traces")}
    assert below == {"traces/steps.parquet", "traces/max_logits.parquet"}


def test_the_data_is_an_input_of_the_run(store, begin):
    run = begin()
    run.log_dataset("shakespeare", "f" * 64)
    (entry,) = connect(store).get_run(run.run_id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("shakespeare", "f" * 36)
