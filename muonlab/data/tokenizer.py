"""Tokenizers: the bytes themselves, or byte-pair encoding trained on the training split.

Both are lossless on any text they accept, and neither has special tokens.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from muonlab.errors import MuonlabError
from muonlab.settings.data import TokenizerSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PIECES_AT_ONCE = 32


class ByteTokenizer:
    """A token is a byte value. A `vocab_size` below 256 means that only the first values occur."""

    name = "byte"
    dtype = np.dtype("u1")

    def __init__(self, vocab_size: int = 256):
        self.vocab_size = vocab_size

    @property
    def key(self) -> str:
        """The settings that decide the ids, for the name of a cache entry."""
        return self.name

    def encode(self, pieces: Iterable[bytes]) -> Iterator[tuple[np.ndarray, int]]:
        """The ids of each piece and the number of bytes that they represent."""
        for piece in pieces:
            yield np.frombuffer(piece, np.uint8), len(piece)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids).decode(errors="replace")


class BytePairTokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, over bytes as in GPT-2), by the tokenizers
    library.

    `vocab_size` counts the 256 bytes and the merges; a text too short for that many merges gives fewer,
    and `vocab_size` is their actual number once the tokenizer is trained or loaded. UTF-8 text only.

    A merge never crosses the pieces that it is given. The time is quadratic in the longest word of a piece, which
    `corpus.pieces` bounds: it cuts runs of more than RUN_BYTES bytes without white space, and no others, so that
    ordinary text has the tokens that it has without the bound.
    """

    name = "bpe"
    dtype = np.dtype("<u2")
    file_name = "tokenizer.json"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        # Another version of the library may choose other merges, so its tokens are other tokens.
        self.key = f"bpe{vocab_size}-tokenizers{version('tokenizers')}"
        self._trained: Tokenizer | None = None
        self._saved: Callable[[], str] | None = None
        self._place: Path | None = None

    def train(self, pieces: Iterable[bytes]) -> None:
        """Learn the merges from a split's text, with progress on a terminal.

        Raises MuonlabError for text that is not UTF-8.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        )
        tokenizer.train_from_iterator(map(_utf8, pieces), trainer)
        self._trained, self.vocab_size = tokenizer, tokenizer.get_vocab_size()

    def encode(self, pieces: Iterable[bytes]) -> Iterator[tuple[np.ndarray, int]]:
        """The ids of each piece and the number of bytes that they represent."""
        pieces = iter(pieces)
        while group := list(islice(pieces, _PIECES_AT_ONCE)):
            encoded = self._library_tokenizer.encode_batch_fast([_utf8(piece) for piece in group])
            for piece, encoding in zip(group, encoded, strict=True):
                yield np.array(encoding.ids, self.dtype), len(piece)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 (a character cut in half) become U+FFFD."""
        return self._library_tokenizer.decode(ids)

    def save(self, folder: Path) -> None:
        """Write the trained merges to `folder`."""
        self._library_tokenizer.save(str(folder / self.file_name))

    def load(self, folder: Path, vocab_size: int) -> None:
        """Use the merges saved in `folder`; they are read when first needed."""
        file = folder / self.file_name
        self.vocab_size = vocab_size
        self.restore(lambda: file.read_text(encoding="utf-8"), file)

    def saved(self) -> str:
        """The trained merges as JSON."""
        return self._library_tokenizer.to_str()

    def restore(self, saved: Callable[[], str], place: Path) -> None:
        """Use the merges that `saved` returns, called when they are first needed; `place` is what errors name."""
        self._saved, self._place = saved, place

    @property
    def _library_tokenizer(self) -> "Tokenizer":
        if self._trained is None:
            from tokenizers import Tokenizer

            assert self._saved is not None, "it is trained or restored first"
            try:
                self._trained = Tokenizer.from_str(self._saved())
            except Exception as error:  # the library raises nothing narrower
                raise MuonlabError(f"cannot read the tokenizer {self._place}: {error}") from error
        return self._trained


def make_tokenizer(settings: object, symbols: int = 256) -> ByteTokenizer | BytePairTokenizer:
    """The tokenizer of a section, still untrained; by default bytes, of which the first `symbols` occur."""
    if isinstance(settings, TokenizerSettings) and settings.tokenizer == BytePairTokenizer.name:
        return BytePairTokenizer(settings.bpe_vocab_size)
    return ByteTokenizer(symbols)


def _utf8(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        raise MuonlabError(
            "tokenizer=bpe needs UTF-8 text, but this text holds the bytes "
            f"{piece[error.start : error.end]!r}; use tokenizer=byte for it"
        ) from None
