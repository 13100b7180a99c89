import hashlib
import itertools
import sys
from types import SimpleNamespace

import pytest

from muonlab.data import build_data, corpus_digest, make_data
from muonlab.data.huggingface import write_documents
from muonlab.errors import MuonlabError
from muonlab.settings.check import build
from muonlab.settings.data import HuggingFaceSettings


def library(load_dataset):
    return SimpleNamespace(load_dataset=load_dataset)


def refuse(**request):
    raise AssertionError("the library must not be asked")


def test_documents_are_whole_and_every_nth_is_held_out(tmp_path):
    endless = (f"é{i}" for i in itertools.count())
    write_documents(endless, tmp_path, max_bytes=40, val_fraction=0.25)
    train, val = (tmp_path / "train.txt").read_bytes(), (tmp_path / "val.txt").read_bytes()
    # Each "é0" is three bytes and a zero: ten documents make forty bytes.
    assert [d.decode() for d in train.split(b"\0")[:-1]] == [f"é{i}" for i in (0, 1, 2, 4, 5, 6, 8, 9)]
    assert val == "é3\0é7\0".encode()
    everything = "".join(f"é{i}\0" for i in range(10)).encode()
    assert (tmp_path / "sha256").read_text() == hashlib.sha256(everything).hexdigest()


def test_too_few_documents_are_one_sentence(tmp_path):
    with pytest.raises(MuonlabError, match="3 documents are too few to hold out every 20th"):
        write_documents(["a", "b", "c"], tmp_path, max_bytes=1000, val_fraction=0.05)


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MuonlabError, match=r"needs the package datasets.*pip install 'muonlab\[hub\]'"):
        build_data("huggingface", dataset="tinystories", cache=tmp_path)


def test_no_network_is_one_sentence_and_the_library_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", library(refuse))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MuonlabError, match=r"needs a network, but http://127.0.0.1:9 cannot be reached"):
        build_data("huggingface", cache=tmp_path)
    assert list((tmp_path / "huggingface").iterdir()) == []


def test_a_misspelt_short_name_names_the_near_one(tmp_path):
    with pytest.raises(MuonlabError, match="'tinystorys'; did you mean 'tinystories'"):
        build_data("huggingface", dataset="tinystorys", cache=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"val_fraction": 0.0}, "data.val_fraction must be a number above 0 and at most 0.5, not 0.0"),
        ({"val_fraction": 0.6}, "data.val_fraction must be a number above 0 and at most 0.5, not 0.6"),
        ({"max_bytes": 0}, "data.max_bytes must be a whole number of at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_one_sentence(wrong, message, tmp_path):
    with pytest.raises(MuonlabError, match=message):
        build_data("huggingface", cache=tmp_path, **wrong)


def rows(text="a story", number=40):
    return library(lambda **request: ({"text": text} for _ in range(number)))


def test_a_dataset_is_downloaded_for_its_digest_and_only_once(tmp_path, monkeypatch):
    settings = build(HuggingFaceSettings, {"dataset": str(tmp_path)}, "data")
    monkeypatch.setitem(sys.modules, "datasets", rows())
    digest = corpus_digest(settings, tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "datasets", library(refuse))
    assert corpus_digest(settings, tmp_path / "cache") == digest
    assert digest == hashlib.sha256(b"a story\0" * 40).hexdigest()[:16]
    assert len(make_data(settings, tmp_path / "cache").val) == 2 * len(b"a story\0")
    [file] = (tmp_path / "cache").rglob("val.txt")
    file.unlink()
    with pytest.raises(MuonlabError, match="is damaged; delete it"):
        corpus_digest(settings, tmp_path / "cache")


def test_a_field_that_is_not_text_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", rows(text=3))
    with pytest.raises(MuonlabError, match=r"the field 'text' of dataset .* holds int, not text"):
        build_data("huggingface", dataset=str(tmp_path), cache=tmp_path / "cache")


def test_what_the_library_raises_is_one_sentence(tmp_path, monkeypatch):
    def missing(**request):
        raise FileNotFoundError("Couldn't find any data file\nin a long list")

    monkeypatch.setitem(sys.modules, "datasets", library(missing))
    with pytest.raises(MuonlabError, match=r"cannot read the dataset .*: Couldn't find any data file$"):
        build_data("huggingface", dataset=str(tmp_path), cache=tmp_path / "cache")


def test_a_local_folder_through_the_real_library(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "stories"
    folder.mkdir()
    (folder / "train.txt").write_text("".join(f"Story number {i}.\n" for i in range(50)))
    settings = {"dataset": str(folder), "val_fraction": 0.1, "cache": tmp_path / "cache"}
    data = build_data("huggingface", max_bytes=400, **settings)
    assert data.decode(data.train).startswith("Story number 0.\0Story number 1.\0")
    assert data.decode(data.val).startswith("Story number 9.\0Story number 19.\0")
    assert 400 <= len(data.train) + len(data.val) < 420
    with pytest.raises(MuonlabError, match=r"unknown field .* 'txt'; did you mean 'text'"):
        build_data("huggingface", field="txt", **settings)
