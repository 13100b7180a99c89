"""What happens to a run's folder around the run: kills at its end, torn files, signals, another writer."""

import gc
import json
import shutil
import signal
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record import RunRecord, load_run
from muonlab.train import checkpoints as checkpoints_module
from muonlab.train.checkpoints import checkpoint_path, latest_checkpoint
from muonlab.train.module import LanguageModel
from muonlab.train.recording import Recording
from muonlab.train.run import run_folder, train, with_corpus


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may handle it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody disturbed, and how to ask for one like it elsewhere."""
    from tiny_runs import TINY

    from muonlab.cli import compose_config, plain
    from muonlab.train.config import read_config

    def ask(place, *overrides):
        paths = [f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}"]
        return with_corpus(read_config(plain(compose_config("train", [*TINY, *paths, *overrides]))))

    return train(ask(tmp_path_factory.mktemp("whole"))).folder, ask


def assert_equal(one, other):
    runs = load_run(one), load_run(other)
    assert [run.status for run in runs] == ["finished", "finished"]
    assert runs[0].metrics == runs[1].metrics
    for frame in ("steps", "max_logits", "events"):
        a, b = (getattr(run, frame) for run in runs)
        pd.testing.assert_frame_equal(
            a.drop(columns="seconds", errors="ignore"),
            b.drop(columns="seconds", errors="ignore"),
            check_exact=True,
        )
    names = [sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt")) for folder in (one, other)]
    assert names[0] == names[1] == ["step-00000008.ckpt", "step-00000012.ckpt"]
    states = [
        torch.load(folder / "checkpoints" / names[0][-1], weights_only=True)["state_dict"]
        for folder in (one, other)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    left = [
        path.name for path in other.rglob("*") if path.name.endswith((".tmp", ".new")) or "lease" in path.name
    ]
    assert not left
    assert not [path.name for path in other.parent.iterdir() if path.name.startswith(f".{other.name}")]


def kill_at(step):
    def on_step(done):
        if done == step:
            raise Killed

    return on_step


def stopped(config, monkeypatch, step=10):
    """A run that was killed in its step 10 of 12, two steps after its checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "finish", lambda *_: None)
        with pytest.raises(Killed):
            train(config, on_step=kill_at(step))
    return run_folder(config)


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


# ---------------------------------------------------------------------- torn files
def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"\x00\xff" * 500)


def cut_at_a_line(path):
    """The beginning of a YAML file is a YAML file."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))


@pytest.mark.parametrize("tear", [cut, cut_at_a_line, empty, garbage])
@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "environment.json",
        "routing.json",
        "status.json",
        "checkpoints/step-00000008.ckpt",
        "traces/steps-0002.parquet",
        "traces/max_logits-0001.parquet",
    ],
)
def test_a_torn_file_is_set_aside_and_the_run_resumes(whole, tmp_path, monkeypatch, capsys, name, tear):
    folder, ask = whole
    config = ask(tmp_path)
    torn = stopped(config, monkeypatch) / name
    tear(torn)
    content = torn.read_bytes()
    assert train(config).status == "finished"
    assert_equal(folder, run_folder(config))
    assert torn.with_name(f"{torn.name}.torn").read_bytes() == content
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "was damaged: unreadable files are kept as" in printed
    sessions = json.loads((run_folder(config) / "status.json").read_text())["sessions"]
    assert name.startswith("checkpoints") or sessions[-1]["torn"] == [
        torn.with_name(f"{torn.name}.torn").name
    ]


@pytest.mark.parametrize("tear", [cut, cut_at_a_line])
@pytest.mark.parametrize("name", ["config.yaml", "status.json", "events.json", "traces/steps.parquet"])
def test_a_torn_file_of_a_finished_run_is_made_again_by_its_command(whole, tmp_path, name, tear):
    folder, ask = whole
    config = ask(tmp_path)
    train(config)
    tear(run_folder(config) / name)
    if name == "config.yaml":
        with pytest.raises(MuonlabError, match=r"config\.yaml"):
            load_run(run_folder(config))
    assert train(config).trained
    assert_equal(folder, run_folder(config))


def test_a_file_that_is_missing_is_written_again(whole, tmp_path, monkeypatch):
    folder, ask = whole
    config = ask(tmp_path)
    place = stopped(config, monkeypatch)
    for name in ("config.yaml", "status.json", "routing.json"):
        (place / name).unlink()
    assert train(config).status == "finished"
    assert_equal(folder, place)


def test_where_every_checkpoint_is_torn_the_run_begins_anew(whole, tmp_path, monkeypatch, capsys):
    folder, ask = whole
    config = ask(tmp_path)
    place = stopped(config, monkeypatch)
    for path in (place / "checkpoints").iterdir():
        cut(path)
    assert train(config).status == "finished"
    assert_equal(folder, place)
    assert "it starts again from step 0" in capsys.readouterr().err


def test_a_run_killed_before_it_removed_its_oldest_checkpoint_does_so_when_it_resumes(whole, tmp_path):
    """In its end, where no step is left that would save another."""
    folder, ask = whole
    config = ask(tmp_path)
    place = train(config).folder
    shutil.copy(checkpoint_path(place / "checkpoints", 8), checkpoint_path(place / "checkpoints", 4))
    state = json.loads((place / "status.json").read_text())
    (place / "status.json").write_text(json.dumps(state | {"status": "running"}))
    assert train(config).status == "finished"
    assert_equal(folder, place)


def test_a_file_that_is_not_a_checkpoint_is_not_taken_for_one(whole, tmp_path):
    real = torch.load(whole[0] / "checkpoints" / "step-00000008.ckpt", weights_only=True)
    for value in ({"weights": torch.ones(2)}, [1], {**real, "muonlab": None}, {**real, "global_step": 9}):
        torch.save(value, checkpoint_path(tmp_path, 8))
        assert latest_checkpoint(tmp_path, 100, 12) == (None, [tmp_path / "step-00000008.ckpt.torn"])
        (tmp_path / "step-00000008.ckpt.torn").unlink()
    with zipfile.ZipFile(checkpoint_path(tmp_path, 8), "w") as archive:
        archive.writestr("data.pkl", b"")
    assert latest_checkpoint(tmp_path, 100, 12)[0] is None


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "Input/output error"), RuntimeError("can't allocate memory")]
)
def test_a_good_checkpoint_that_cannot_be_loaded_now_is_kept(whole, tmp_path, monkeypatch, error):
    _, ask = whole
    config = ask(tmp_path)
    place = stopped(config, monkeypatch)

    def refuse(*_, **__):
        raise error

    before = {path.name: path.read_bytes() for path in (place / "checkpoints").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module.torch, "load", refuse)
        with pytest.raises(EnvironmentFault, match="cannot read"):
            train(config)
    assert {path.name: path.read_bytes() for path in (place / "checkpoints").iterdir()} == before
    assert train(config).status == "finished"


@pytest.mark.parametrize("flip", [0.3, 0.5, 0.9])
def test_one_wrong_byte_in_a_checkpoint_is_found(whole, tmp_path, flip):
    path = checkpoint_path(tmp_path, 8)
    content = bytearray((whole[0] / "checkpoints" / "step-00000008.ckpt").read_bytes())
    with zipfile.ZipFile(whole[0] / "checkpoints" / "step-00000008.ckpt") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200 + int(flip * (largest.file_size - 200))] ^= 1
    path.write_bytes(content)
    assert latest_checkpoint(tmp_path, 100, 12)[0] is None


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
