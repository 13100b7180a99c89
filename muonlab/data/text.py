"""Any text file, or any folder of .txt files, by path."""

import hashlib
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path

from muonlab.data.cache import tokenize
from muonlab.data.corpus import Corpus, pieces
from muonlab.data.token_data import TokenData
from muonlab.data.tokenizer import make_tokenizer
from muonlab.errors import MuonlabError

# A file and the range of its bytes: (path, start, stop).
Span = tuple[Path, int, int]


def build_text(
    *,
    path: str | Path | None = None,
    val_fraction: float = 0.1,
    tokenizer: str = "byte",
    bpe_vocab_size: int = 1024,
    cache: str | Path | None = None,
) -> TokenData:
    """The text at `path`: a file, whatever its name, or every *.txt below a folder, sorted by path.

    The last `val_fraction` (over 0, under 1) is held out: of the files, at least one, where there are
    several; of the bytes of a single one, cut between characters. Relative paths begin at the current folder.
    The cache is keyed by what the files hold, so an edited text is tokenized anew.
    Raises MuonlabError for a path that is missing, unreadable or without text.
    """
    if path is None:
        raise MuonlabError(
            "data 'text' needs a text file or a folder of .txt files, as in data.path=input.txt"
        )
    if not 0 < val_fraction < 1:
        raise MuonlabError(f"val_fraction must be over 0 and under 1, not {val_fraction}")
    path = Path(path).expanduser()
    try:
        files = _text_files(path)
        train, val = split_files(files, val_fraction)
        digest = _content_digest(files, train, val)
    except OSError as error:
        raise MuonlabError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    corpus = Corpus(
        name="text",
        source=str(path),
        digest=digest,
        train=lambda: _read(train),
        val=lambda: _read(val),
    )
    return tokenize(corpus, make_tokenizer(tokenizer, bpe_vocab_size), cache)


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise MuonlabError(f"there is no file or folder {path}")
    files = sorted(file for file in path.rglob("*.txt") if not file.is_dir()) if path.is_dir() else [path]
    if not files:
        raise MuonlabError(f"the folder {path} holds no .txt files")
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise MuonlabError(f"there is no text in {path}: it is empty")
    return files


def split_files(files: list[Path], val_fraction: float) -> tuple[list[Span], list[Span]]:
    """The spans of the training and the validation split; see `build_text` for the rule."""
    if len(files) > 1:
        held_out = min(max(round(len(files) * val_fraction), 1), len(files) - 1)
        spans = [(file, 0, file.stat().st_size) for file in files]
        return spans[:-held_out], spans[-held_out:]
    file, size = files[0], files[0].stat().st_size
    cut = int(size * (1 - val_fraction))
    with file.open("rb") as text:
        text.seek(cut)
        # 10xxxxxx continues a UTF-8 character, for at most three bytes.
        while cut < size and text.read(1)[0] & 0xC0 == 0x80:
            cut += 1
    return [(file, 0, cut)], [(file, cut, size)]


def _content_digest(files: list[Path], *splits: list[Span]) -> str:
    """Digest of what the files hold and of where the splits are cut."""
    digest = hashlib.sha256(str([[span[1:] for span in spans] for spans in splits]).encode())
    for file in files:
        with file.open("rb") as text:
            digest.update(hashlib.file_digest(text, "sha256").digest())
    return digest.hexdigest()


def _read(spans: list[Span]) -> Iterator[bytes]:
    for file, start, stop in spans:
        try:
            with file.open("rb") as handle, mmap(handle.fileno(), 0, access=ACCESS_READ) as text:
                yield from pieces(text, start, stop)
        except OSError as error:
            raise MuonlabError(f"cannot read {file}: {error.strerror or error}") from error
