"""A corpus before tokenization: the location of its text, read piece by piece."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from mmap import mmap

PIECE_BYTES = 1 << 16
# The longest run of bytes without white space that is left whole: byte-pair encoding takes time quadratic in its length
# (random letters: 1.8 s per megabyte in runs of this length, practically forever in one run).
RUN_BYTES = 1 << 12
_WHITE_SPACE = b" \n\r\t"
_FIRST_WHITE_SPACE = re.compile(rb"[ \n\r\t]")

Text = bytes | mmap


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text with whole works or files held out for validation.

    `train` and `val` are called only when the tokens are not in the cache yet; each gives the text of its split as
    consecutive pieces of bytes. `digest` is any string that distinguishes these bytes from all others; it is needed
    at every start, so it should not cost more than reading them once. `source` is a line for human readers.

    `symbols`: only the byte values below it occur. `has_long_runs` says whether a split has any of `long_runs`, which
    byte-pair encoding sees cut. `conditional_entropies` are those of `TokenData`; natural text has none.
    """

    name: str
    source: str
    digest: str
    train: Callable[[], Iterable[bytes]]
    val: Callable[[], Iterable[bytes]]
    symbols: int = 256
    has_long_runs: Callable[[], bool] = lambda: False
    conditional_entropies: Callable[[], tuple[float, ...]] = lambda: ()

    @property
    def short_digest(self) -> str:
        """16 hex digits for `digest`: its first ones, or those of its SHA-256 where it is not in hex."""
        if re.fullmatch(r"[0-9a-f]{16,}", self.digest):
            return self.digest[:16]
        return hashlib.sha256(self.digest.encode()).hexdigest()[:16]


def pieces(text: Text, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Cut text[start:stop] into pieces of about 64 KiB; their concatenation is the text.

    A cut falls just before white space, which is never inside a UTF-8 character and is where byte-level BPE would split
    words anyway. Only a run of more than RUN_BYTES bytes without white space is cut elsewhere: into pieces of at most
    RUN_BYTES, between characters if it is UTF-8. So no piece is longer than 68 KiB.
    """
    stop = len(text) if stop is None else stop
    for first, end in long_runs(text, start, stop):
        yield from _cut_before_white_space(text, start, first)
        yield from _cut_between_characters(text, first, end)
        start = end
    yield from _cut_before_white_space(text, start, stop)


def long_runs(text: Text, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The ranges (first, end) of text[start:stop] that have more than RUN_BYTES bytes and no white space."""
    while stop - start > RUN_BYTES:
        # A run that ends before the last white space among the next bytes is short enough: ordinary text costs one step
        # for every RUN_BYTES.
        window = text[start : start + RUN_BYTES + 1]
        last = max(window.rfind(space) for space in _WHITE_SPACE)
        if last >= 0:
            start += last + 1
            continue
        space = _FIRST_WHITE_SPACE.search(text, start + RUN_BYTES, stop)
        end = space.start() if space else stop
        yield start, end
        start = end


def _cut_before_white_space(text: Text, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        space = _FIRST_WHITE_SPACE.search(text, min(start + PIECE_BYTES, stop), stop)
        cut = space.start() if space else stop
        yield text[start:cut]
        start = cut


def _cut_between_characters(text: Text, start: int, stop: int) -> Iterator[bytes]:
    while stop - start > RUN_BYTES:
        cut = start + RUN_BYTES
        # 10xxxxxx continues a UTF-8 character, for at most three bytes.
        begins = [place for place in range(cut, cut - 4, -1) if text[place] & 0xC0 != 0x80]
        cut = begins[0] if begins else cut
        yield text[start:cut]
        start = cut
    yield text[start:stop]
