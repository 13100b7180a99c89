"""Any text file, or any folder of .txt files, by path."""

import hashlib
from pathlib import Path

from muonlab.data.cache import CachePath, expand_user
from muonlab.data.corpus import Corpus
from muonlab.data.spans import Span, have_long_runs, read_spans, whole
from muonlab.errors import MuonlabError
from muonlab.settings.data import TextSettings


def open_text(cache: CachePath, settings: TextSettings) -> Corpus:
    """The text at `path`: a file, whatever its name, or every *.txt below a folder, sorted by path.

    The last `val_fraction` is held out: of the files, at least one, where there are several; of the bytes of a single
    one, cut between characters. Relative paths begin at the current folder. The digest is that of the contents, so an
    edited text is a different corpus. Raises MuonlabError for a path that is missing, unreadable or without text.
    """
    path = expand_user(settings.path or "")
    try:
        files = _text_files(path)
        train, val = split_files(files, settings.val_fraction)
        digest = _content_digest(files, train, val)
    except OSError as error:
        raise MuonlabError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    return Corpus(
        name="text",
        source=str(path),
        digest=digest,
        train=lambda: read_spans(train),
        val=lambda: read_spans(val),
        has_long_runs=lambda: have_long_runs([*train, *val]),
    )


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise MuonlabError(f"there is no file or folder {path}")
    if not path.is_file() and not path.is_dir():  # a pipe or a device, which may have no end
        raise MuonlabError(f"{path} is neither a file nor a folder")
    files = sorted(filter(_may_hold_text, path.rglob("*.txt"))) if path.is_dir() else [path]
    if not files:
        raise MuonlabError(f"the folder {path} holds no .txt files")
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise MuonlabError(f"there is no text in {path}: it is empty")
    return files


def _may_hold_text(path: Path) -> bool:
    """Whether it is a file, or a broken link, which deserves an error; not a folder, pipe or device."""
    return path.is_file() or not path.exists()


def split_files(files: list[Path], val_fraction: float) -> tuple[list[Span], list[Span]]:
    """The spans of the training and the validation split; see `open_text` for the rule."""
    spans = [whole(file) for file in files]
    if len(spans) > 1:
        held_out = min(max(round(len(spans) * val_fraction), 1), len(spans) - 1)
        return spans[:-held_out], spans[-held_out:]
    [span] = spans
    cut = int(span.stop * (1 - val_fraction))
    with span.file.open("rb") as text:
        text.seek(cut)
        # 10xxxxxx continues a UTF-8 character, for at most three bytes.
        while cut < span.stop and text.read(1)[0] & 0xC0 == 0x80:
            cut += 1
    return [span._replace(stop=cut)], [span._replace(start=cut)]


def _content_digest(files: list[Path], *splits: list[Span]) -> str:
    """Digest of the contents of the files and of the place where the splits are cut."""
    cuts = [[(span.start, span.stop) for span in spans] for spans in splits]
    digest = hashlib.sha256(str(cuts).encode())
    for file in files:
        with file.open("rb") as text:
            digest.update(hashlib.file_digest(text, "sha256").digest())
    return digest.hexdigest()
