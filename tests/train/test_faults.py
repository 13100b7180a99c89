"""What happens to a run's folder around the run: kills at its end, signals, a full disk, another writer."""

import gc
import json
import signal
from pathlib import Path

import pytest
import torch
from killed_runs import Killed, assert_equal, cut

from muonlab.errors import EnvironmentFault
from muonlab.record import RunRecord, load_run
from muonlab.train import checkpoints as checkpoints_module
from muonlab.train.module import LanguageModel
from muonlab.train.recording import Recording
from muonlab.train.run import run_folder, train


# ---------------------------------------------------------------------- its end
def in_final_validation(patch):
    def validate(module):
        if module.trainer.global_step == 12:
            raise Killed
        return real(module)

    real = LanguageModel.validate
    patch.setattr(LanguageModel, "validate", validate)
    patch.setattr(Recording, "finish", lambda *_: None)


def before_the_state_is_written(patch):
    def write(record):
        if record.status != "running":
            raise Killed
        return real(record)

    real = RunRecord._write_state
    patch.setattr(RunRecord, "_write_state", write)


def before_the_record_is_ended(patch):
    def end(*_):
        raise Killed

    patch.setattr(RunRecord, "finish", end)


@pytest.mark.parametrize(
    "window", [in_final_validation, before_the_record_is_ended, before_the_state_is_written]
)
def test_a_run_killed_after_its_last_step_has_its_metrics_when_it_is_resumed(
    whole, tmp_path, monkeypatch, window
):
    folder, ask = whole
    config = ask(tmp_path)
    with monkeypatch.context() as patch:
        window(patch)
        with pytest.raises(Killed):
            train(config)
    assert load_run(run_folder(config)).status == "interrupted"
    assert train(config).status == "finished"
    assert_equal(folder, run_folder(config))


def test_a_finished_run_without_metrics_gets_them(whole, tmp_path):
    """As the last version left runs that were stopped within their last step."""
    folder, ask = whole
    config = ask(tmp_path)
    train(config)
    state = json.loads((run_folder(config) / "status.json").read_text())
    (run_folder(config) / "status.json").write_text(json.dumps(state | {"metrics": {}}))
    assert train(config).trained
    assert_equal(folder, run_folder(config))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("step", [7, 12])
def test_a_signal_ends_a_run_between_two_steps_and_its_last_step_as_ever(whole, tmp_path, name, step):
    folder, ask = whole
    config = ask(tmp_path)
    number = signal.Signals[name]
    before = signal.getsignal(number)
    outcome = train(config, on_step=lambda done: signal.raise_signal(number) if done == step else None)
    assert signal.getsignal(number) is before
    if step == 7:
        assert (outcome.status, outcome.signal) == ("interrupted", number)
        assert outcome.cause == f"{name} after step 6"
        assert train(config).status == "finished"
    assert_equal(folder, run_folder(config))


def test_a_second_ctrl_c_ends_a_run_at_once(whole, tmp_path):
    folder, ask = whole
    config = ask(tmp_path)

    def insist(done):
        if done == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    outcome = train(config, on_step=insist)
    assert (outcome.status, outcome.signal, outcome.cause) == ("interrupted", 2, "SIGINT within a step")
    assert train(config).status == "finished"
    assert_equal(folder, run_folder(config))


def test_a_second_ctrl_c_while_python_collects_garbage_ends_a_run_after_its_step(whole, tmp_path, capsys):
    """There Python drops what the handler raises, and would print it as a traceback."""
    folder, ask = whole
    config = ask(tmp_path)

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    def insist(done):
        if done == 7:
            Cycle()
            gc.collect()

    outcome = train(config, on_step=insist)
    assert (outcome.status, outcome.signal) == ("interrupted", 2)
    assert outcome.cause.startswith("SIGINT after step")
    assert "Traceback" not in capsys.readouterr().err
    assert train(config).status == "finished"
    assert_equal(folder, run_folder(config))


def test_weights_that_are_lost_before_the_first_step_are_divergence(whole, tmp_path, monkeypatch):
    _, ask = whole
    real = LanguageModel.__init__

    def broken(module, *arguments):
        real(module, *arguments)
        next(module.model.parameters()).data[0] = torch.nan

    monkeypatch.setattr(LanguageModel, "__init__", broken)
    outcome = train(ask(tmp_path))
    assert outcome.status == "diverged"
    assert outcome.cause.endswith("is not finite before the first step")
    assert len(load_run(outcome.folder).steps) == 0


# ---------------------------------------------------------------------- the disk, and another writer
def test_a_disk_that_is_full_for_a_while_costs_the_steps_since_the_checkpoint(whole, tmp_path, monkeypatch):
    folder, ask = whole
    config = ask(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:

        def fill(done):
            if done == 6:
                patch.setattr(checkpoints_module, "_save", full)

        with pytest.raises(EnvironmentFault, match=r"cannot write .*No space left on device"):
            train(config, on_step=fill)
    assert load_run(run_folder(config)).status == "interrupted"
    assert train(config).status == "finished"
    assert_equal(folder, run_folder(config))


def test_a_run_that_was_taken_over_writes_nothing_more(whole, tmp_path):
    folder, ask = whole
    config = ask(tmp_path)
    place = run_folder(config)

    def steal(done):
        if done == 6:
            for path in place.glob(".lease-*"):
                path.rename(place / ".lease-000009")
            text = json.loads((place / ".lease-000009").read_text())
            (place / ".lease-000009").write_text(json.dumps(text | {"token": "another", "pid_started": 1}))

    with pytest.raises(EnvironmentFault, match="was taken over by another process"):
        train(config, on_step=steal)
    assert [path.name for path in (place / "checkpoints").iterdir()] == ["step-00000004.ckpt"]
    assert json.loads((place / "status.json").read_text())["status"] == "running"
    assert train(config).status == "finished"
    assert_equal(folder, place)


def test_a_folder_that_cannot_be_written_when_a_run_ends_or_resumes_costs_nothing(
    whole, tmp_path, monkeypatch
):
    """Whatever the system refuses outside a step is one sentence, and the next command resumes."""
    folder, ask = whole
    config = ask(tmp_path)

    def refuse(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "finish", lambda *_: patch.setattr(Path, "unlink", refuse))
        assert train(config).status == "finished"  # its lease could not be removed
    assert list(run_folder(config).glob(".lease*"))
    for path in run_folder(config).glob(".lease*"):
        path.unlink()
    cut(run_folder(config) / "traces" / "steps-0001.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(EnvironmentFault, match=r"the system refused .*: Read-only file system"):
            train(config)
    assert train(config).status == "finished"
    assert_equal(folder, run_folder(config))
