"""Files of a run that are torn, lost or damaged, and the run that goes on from the others."""

import json
import shutil
import zipfile

import pytest
import torch
from killed_runs import assert_equal, cut, stopped

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record import load_run
from muonlab.train import checkpoints as checkpoints_module
from muonlab.train.checkpoints import checkpoint_path, latest_checkpoint
from muonlab.train.run import run_folder, train


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
