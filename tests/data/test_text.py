import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.data import build_data, make_data, open_corpus
from muonlab.data.text import split_files
from muonlab.errors import MuonlabError
from muonlab.settings.check import build
from muonlab.settings.data import TextSettings


def write_folder(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_a_file_of_any_name_has_its_last_bytes_held_out(tmp_path):
    path = tmp_path / "input.md"
    path.write_bytes(bytes(range(32, 127)) * 10 + b"\xff\x00")
    data = build_data("text", path=path, val_fraction=0.25, cache=tmp_path / "cache")
    assert data.train.tobytes() + data.val.tobytes() == path.read_bytes()
    assert len(data.train) == int(952 * 0.75)
    assert data.source == str(path)


def test_a_folder_has_its_last_files_held_out(tmp_path):
    files = {f"{i}.txt": str(i).encode() for i in range(10)}
    files |= {"deep/er.txt": b"deep", "notes.md": b"no", "empty.txt": b""}
    folder = write_folder(tmp_path / "texts", files)
    (folder / "a.txt").mkdir()
    data = build_data("text", path=str(folder), val_fraction=0.2, cache=tmp_path / "cache")
    assert data.train.tobytes() == b"012345678"
    assert data.val.tobytes() == b"9deep"


@pytest.mark.parametrize(("val_fraction", "train", "val"), [(0.01, b"ab", b"c"), (0.99, b"a", b"bc")])
def test_a_folder_keeps_a_file_on_either_side(tmp_path, val_fraction, train, val):
    folder = write_folder(tmp_path / "texts", {"1.txt": b"a", "2.txt": b"b", "3.txt": b"c"})
    data = build_data("text", path=folder, val_fraction=val_fraction, cache=tmp_path / "cache")
    assert (data.train.tobytes(), data.val.tobytes()) == (train, val)


@settings(deadline=None)
@given(text=st.text(min_size=1, max_size=60), val_fraction=st.floats(0.01, 0.99))
def test_one_file_is_cut_between_characters(tmp_path_factory, text, val_fraction):
    path = tmp_path_factory.mktemp("cut") / "one.txt"
    path.write_bytes(text.encode())
    [(_, start, cut, _)], [(_, cut_again, stop, _)] = split_files([path], val_fraction)
    size = len(text.encode())
    assert (start, cut_again, stop) == (0, cut, size)
    assert 0 <= cut - int(size * (1 - val_fraction)) <= 3
    assert text.encode()[:cut].decode() + text.encode()[cut:].decode() == text


def test_an_edited_file_is_another_corpus(tmp_path):
    path = tmp_path / "input.txt"
    path.write_bytes(b"to be or not to be")
    before = build_data("text", path=path, cache=tmp_path / "cache")
    path.write_bytes(b"to be or not to BE")
    after = build_data("text", path=path, cache=tmp_path / "cache")
    assert after.digest != before.digest
    assert after.val.tobytes() == b"BE"
    refolded = build_data("text", path=path, val_fraction=0.5, cache=tmp_path / "cache")
    assert refolded.train.tobytes() == b"to be or "
    copy = tmp_path / "copy.txt"
    copy.write_bytes(path.read_bytes())
    assert build_data("text", path=copy, cache=tmp_path / "cache").digest == after.digest


def test_byte_pairs_on_a_file(tmp_path):
    path = tmp_path / "input.txt"
    path.write_bytes("Ils étaient là, où ça mène. ".encode() * 100)
    data = build_data("text", path=path, tokenizer="bpe", bpe_vocab_size=280, cache=tmp_path / "cache")
    assert data.decode(data.train) + data.decode(data.val) == path.read_text()
    assert data.bytes_per_token == pytest.approx(len(data.decode(data.val).encode()) / len(data.val))
    again = build_data("text", path=path, tokenizer="bpe", bpe_vocab_size=280, cache=tmp_path / "cache")
    assert again.decode(again.train[:20]) == data.decode(data.train[:20])
    assert again.digest == data.digest


def test_byte_pairs_are_learnt_from_the_training_split_alone(tmp_path):
    folder = write_folder(tmp_path / "texts", {"1.txt": b"abba abba " * 50, "2.txt": b"zyzy zyzy " * 50})
    build_data("text", path=folder, tokenizer="bpe", bpe_vocab_size=262, cache=tmp_path / "cache")
    [merges] = (tmp_path / "cache").rglob("tokenizer.json")
    merged = [token for token in json.loads(merges.read_text())["model"]["vocab"] if len(token) > 1]
    assert "abba" in merged
    assert not any("z" in token or "y" in token for token in merged)


def test_bad_paths_are_one_sentence(tmp_path):
    empty, folder, broken = tmp_path / "empty.txt", tmp_path / "folder", tmp_path / "broken"
    empty.touch()
    write_folder(folder, {"image.png": b"\x89PNG"})
    broken.mkdir()
    (broken / "gone.txt").symlink_to(tmp_path / "nowhere")
    for path, message in (
        (tmp_path / "missing.txt", "there is no file or folder .*missing.txt"),
        (empty, "there is no text in .*: it is empty"),
        (folder, "the folder .* holds no .txt files"),
        (broken, "cannot read .*gone.txt: No such file or directory"),
        (None, "needs a text file or a folder"),
    ):
        with pytest.raises(MuonlabError, match=message):
            build_data("text", path=path, cache=tmp_path / "cache")
    one = tmp_path / "one.txt"
    one.write_bytes(b"x")
    with pytest.raises(MuonlabError, match="has an empty train split"):
        build_data("text", path=one, cache=tmp_path / "cache")
    with pytest.raises(
        MuonlabError, match=r"data.val_fraction must be a number above 0 and below 1, not 1.0"
    ):
        build_data("text", path=one, val_fraction=1.0, cache=tmp_path / "cache")


def test_a_file_that_changes_between_its_digest_and_its_tokens_is_one_sentence(tmp_path):
    path = tmp_path / "input.txt"
    path.write_bytes(b"to be or not to be")
    settings = build(TextSettings, {"path": str(path)}, "data")
    corpus = open_corpus(settings)
    path.write_bytes(b"to be or not to BE")
    os.utime(path, ns=(0, 0))
    with pytest.raises(MuonlabError, match=r"input.txt changed while it was being read; start again"):
        make_data(settings, tmp_path / "cache", corpus)
    path.unlink()
    with pytest.raises(MuonlabError, match=r"cannot read .*input.txt: No such file or directory"):
        make_data(settings, tmp_path / "cache", corpus)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
