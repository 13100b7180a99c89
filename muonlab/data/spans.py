"""Ranges of files as text: mapped, so that the largest file takes no memory, and read as the digest saw them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

from muonlab.data.corpus import long_runs, pieces
from muonlab.errors import MuonlabError


class Span(NamedTuple):
    """The bytes start..stop of a file as it was at `changed`, its time of modification in nanoseconds."""

    file: Path
    start: int
    stop: int
    changed: int


def whole(file: Path) -> Span:
    """The span of a whole file; raises OSError where it cannot be read."""
    state = file.stat()
    return Span(file, 0, state.st_size, state.st_mtime_ns)


def read_spans(spans: Iterable[Span]) -> Iterator[bytes]:
    """The text of the spans in order, in pieces; raises MuonlabError for a file that has changed or is gone."""
    for span in spans:
        if span.start < span.stop:
            with _mapped(span) as text:
                yield from pieces(text, span.start, span.stop)


def have_long_runs(spans: Iterable[Span]) -> bool:
    """Whether one of them has a run that `pieces` cuts; raises MuonlabError as `read_spans` does."""
    for span in spans:
        if span.start < span.stop:
            with _mapped(span) as text:
                if any(long_runs(text, span.start, span.stop)):
                    return True
    return False


@contextmanager
def _mapped(span: Span) -> Iterator[mmap]:
    try:
        with span.file.open("rb") as handle:
            if os.fstat(handle.fileno()).st_mtime_ns != span.changed:
                raise MuonlabError(f"{span.file} changed while it was being read; start again")
            with mmap(handle.fileno(), 0, access=ACCESS_READ) as text:
                yield text
    except OSError as error:
        raise MuonlabError(f"cannot read {span.file}: {error.strerror or error}") from error
