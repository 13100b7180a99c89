"""Tokens in one file, for machines without a network: `python -m muonlab.data pack FILE` writes it, data=tokens reads
it.

muonlab tokens 1\\n             the form
<64 hex digits>\\n              SHA-256 of everything after this line
{"vocab_size": ...}\\n          a Header as JSON
the tokenizer's JSON, filled up with line ends to a multiple of 64 bytes from the beginning; of bytes: nothing
the ids of the training split, then those of the validation split: uint16, little-endian
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from muonlab.data.cache import CachePath, expand_user
from muonlab.data.token_data import TokenData
from muonlab.data.tokenizer import BytePairTokenizer, ByteTokenizer
from muonlab.errors import MuonlabError, system_fault
from muonlab.settings.check import Count, Text, build
from muonlab.settings.data import PackedSettings

FORM = b"muonlab tokens 1\n"
IDS = np.dtype("<u2")
_START = len(FORM) + 65  # of what the digest is of
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Header:
    """What TokenData says of its tokens. tokenizer: its key. text: bytes of the tokenizer's JSON."""

    tokenizer: Text
    vocab_size: Count
    train_tokens: Count
    val_tokens: Count
    digest: Text
    bytes_per_token: float
    conditional_entropies: tuple[float, ...]
    text: int


@dataclass(frozen=True, eq=False)
class Packed:
    """Tokens whose text is elsewhere. digest: SHA-256, in hex, of ids, splits and tokenizer."""

    digest: str
    tokens: TokenData

    @property
    def short_digest(self) -> str:
        """The first 16 hex digits."""
        return self.digest[:16]


def pack(data: TokenData, path: Path) -> int:
    """Write tokens and their tokenizer into one file, whole or not at all; returns its size in bytes. The same tokens
    give the same bytes. Raises MuonlabError where the file cannot be written."""
    tokenizer = data.tokenizer
    saved = tokenizer.saved().encode("utf-8") if isinstance(tokenizer, BytePairTokenizer) else b""
    header = Header(
        tokenizer=tokenizer.key,
        vocab_size=data.vocab_size,
        train_tokens=len(data.train),
        val_tokens=len(data.val),
        digest=data.digest,
        bytes_per_token=data.bytes_per_token,
        conditional_entropies=data.conditional_entropies,
        text=len(saved),
    )
    begin = json.dumps(asdict(header)).encode("utf-8") + b"\n" + saved
    begin += b"\n" * (-(_START + len(begin)) % _ALIGNMENT)
    content = [begin, *(np.asarray(ids, IDS).tobytes() for ids in (data.train, data.val))]
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)

    try:
        with TemporaryDirectory(prefix=".draft-", dir=path.parent) as scratch:
            draft = Path(scratch, path.name)
            with draft.open("wb") as file:
                file.write(FORM + digest.hexdigest().encode() + b"\n")
                file.writelines(content)
            draft.replace(path)
    except OSError as error:
        raise system_fault(error) from error
    return path.stat().st_size


def open_packed(cache: CachePath, settings: PackedSettings) -> Packed:
    """The tokens in the file at `path`, mapped, after its digest was compared with its content: the file is read once.

    Raises MuonlabError for a file that is missing, unreadable, of another form, cut short or changed.
    """
    path = expand_user(settings.path or "")
    if not path.is_file():
        raise MuonlabError(
            f"there is no file {path}; python -m muonlab.data pack {path} makes one from any corpus"
        )
    try:
        if path.stat().st_size == 0:
            raise _other_form(path)
        content = np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise MuonlabError(f"cannot read {path}: {error.strerror or error}") from error
    if content[: len(FORM)].tobytes() != FORM:
        raise _other_form(path)
    digest = hashlib.sha256(content[_START:].data).hexdigest()
    if content[len(FORM) : _START].tobytes() != digest.encode() + b"\n":
        raise MuonlabError(
            f"{path} is torn: its content does not have the digest in its second line; copy it or pack it again"
        )
    return Packed(digest, _tokens(path, content))


def _tokens(path: Path, content: np.ndarray) -> TokenData:
    """The tokens in a file that is whole."""
    end = _START + content[_START : _START + (1 << 20)].tobytes().find(b"\n") + 1
    try:
        header = build(Header, json.loads(content[_START:end].tobytes()), "header")
        begin = end + header.text
        begin += -begin % _ALIGNMENT
        ids = content[begin:].view(IDS)
        if len(ids) != header.train_tokens + header.val_tokens or ids.max() >= header.vocab_size:
            raise MuonlabError("its header describes other tokens")
    except (MuonlabError, ValueError) as error:
        raise MuonlabError(f"{path} was not made by python -m muonlab.data pack: {error}") from error
    tokenizer: ByteTokenizer | BytePairTokenizer = ByteTokenizer(header.vocab_size)
    if header.text:
        tokenizer = BytePairTokenizer(header.vocab_size)
        tokenizer.key = header.tokenizer
        tokenizer.restore(lambda: content[end : end + header.text].tobytes().decode(), path)
    return TokenData(
        name=PackedSettings.name,
        source=str(path),
        train=ids[: header.train_tokens],
        val=ids[header.train_tokens :],
        vocab_size=header.vocab_size,
        digest=header.digest,
        bytes_per_token=header.bytes_per_token,
        tokenizer=tokenizer,
        conditional_entropies=header.conditional_entropies,
    )


def _other_form(path: Path) -> MuonlabError:
    return MuonlabError(
        f"{path} holds no packed tokens; python -m muonlab.data pack makes such a file, and data=text reads any text"
    )
