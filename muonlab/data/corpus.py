"""A corpus before tokenization: where its text is, and how to read it piece by piece."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from mmap import mmap

PIECE_BYTES = 1 << 16
_WHITESPACE = re.compile(rb"[ \n\r\t]")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text with whole works or files held out for validation.

    `train` and `val` are called only when the tokens are not in the cache yet; each gives the text of its
    split as consecutive pieces of bytes. `digest` is any string that tells these bytes from all others; it is
    needed at every start, so it should not cost more than reading them once. `source` is a line for people.
    """

    name: str
    source: str
    digest: str
    train: Callable[[], Iterable[bytes]]
    val: Callable[[], Iterable[bytes]]


def pieces(text: bytes | mmap, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Cut text[start:stop] into pieces of about 64 KiB; their concatenation is the text.

    A cut falls just before white space, which is never inside a UTF-8 character and is where byte-level BPE
    would part words anyway. Text without white space comes out as one piece.
    """
    stop = len(text) if stop is None else stop
    while start < stop:
        space = _WHITESPACE.search(text, min(start + PIECE_BYTES, stop), stop)
        cut = space.start() if space else stop
        yield text[start:cut]
        start = cut
