import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from muonlab.data import build_data
from muonlab.data.cache import build_folder, cache_folder
from muonlab.errors import EnvironmentFault, MuonlabError


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "input.txt"
    path.write_bytes(b"Out, out, brief candle! " * 200)
    return path


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "entries" / "one"

    def fail(draft):
        (draft / "half").write_text("half")
        raise MuonlabError("interrupted")

    with pytest.raises(MuonlabError, match="interrupted"):
        build_folder(target, fail)
    assert list(target.parent.iterdir()) == []


def test_the_first_of_two_processes_wins_and_the_other_uses_its_folder(tmp_path):
    target = tmp_path / "one"

    def slower(draft):
        build_folder(target, lambda other: (other / "who").write_text("first"))
        (draft / "who").write_text("second")

    build_folder(target, slower)
    assert (target / "who").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_two_processes_at_once_leave_one_whole_entry(text, tmp_path):
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "muonlab.data", "text", f"path={text}", "tokenizer=bpe"]
    command += ["bpe_vocab_size=300", f"cache={cache}"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert len({output.split("ready in")[0] for output in outputs}) == 1
    [entry] = (cache / "tokens").iterdir()
    assert sorted(file.name for file in entry.iterdir()) == [
        "meta.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]


def test_tokens_are_mapped_and_cannot_be_written(text, tmp_path):
    data = build_data("text", path=text, cache=tmp_path / "cache")
    assert type(data.train) is np.ndarray
    assert isinstance(data.train.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        data.train[0] = 0


@pytest.mark.parametrize(("file", "size"), [("train.bin", 10), ("val.bin", 0), ("meta.json", 5)])
def test_a_damaged_entry_is_one_sentence(text, tmp_path, file, size):
    build_data("text", path=text, cache=tmp_path / "cache")
    [damaged] = (tmp_path / "cache").rglob(file)
    os.truncate(damaged, size)
    with pytest.raises(MuonlabError, match="is damaged; delete it"):
        build_data("text", path=text, cache=tmp_path / "cache")
    damaged.unlink()
    with pytest.raises(MuonlabError, match="is damaged; delete it"):
        build_data("text", path=text, cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_one_sentence(text):
    with pytest.raises(MuonlabError, match=r"cannot write to the data cache .*; set cache= or"):
        build_data("text", path=text, cache=text / "below")


@pytest.mark.parametrize(
    ("number", "waits"), [(errno.ENOSPC, True), (errno.EIO, True), (errno.EACCES, False)]
)
def test_a_full_disk_is_the_machines_fault_and_a_forbidden_folder_the_users(tmp_path, number, waits):
    def fill(draft):
        raise OSError(number, os.strerror(number))

    with pytest.raises(MuonlabError, match="cannot write to the data cache") as caught:
        build_folder(tmp_path / "entry", fill)
    assert isinstance(caught.value, EnvironmentFault) == waits


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MUONLAB_CACHE", raising=False)
    assert cache_folder(None) == tmp_path / ".cache" / "muonlab"
    monkeypatch.setenv("MUONLAB_CACHE", "/elsewhere")
    assert str(cache_folder(None)) == "/elsewhere"
    assert cache_folder("here") == tmp_path / "here"
    assert cache_folder("~/data") == cache_folder(os.path.expanduser("~/data"))
