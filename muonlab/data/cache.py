"""The cache on disk: entries appear whole or not at all, and tokenized corpora are memory-mapped."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from errno import EDQUOT, EIO, ENOSPC
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from muonlab.data.corpus import RUN_BYTES, Corpus
from muonlab.data.token_data import TokenData
from muonlab.data.tokenizer import BytePairTokenizer, ByteTokenizer
from muonlab.errors import EnvironmentFault, MuonlabError

log = logging.getLogger(__name__)

# Part of every key: raise it when the files below change their meaning.
FORMAT = 1

CachePath = str | Path | None


def cache_folder(cache: CachePath) -> Path:
    """The folder of the cache: `cache`, else $MUONLAB_CACHE, else .cache/muonlab under the current folder."""
    return expand_user(cache or os.environ.get("MUONLAB_CACHE") or Path(".cache", "muonlab")).absolute()


def expand_user(path: str | Path) -> Path:
    """The path with ~ replaced by a home folder; raises MuonlabError for ~name if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise MuonlabError(f"there is no home folder for {Path(path).parts[0]} in {path}") from None


def build_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` by calling `fill` on a draft of it; do nothing if it exists.

    The draft is renamed when it is complete. Processes that start together each make a draft, the first
    rename wins, and the others use its result; a killed process leaves no half-made entry.
    Raises MuonlabError if the folder cannot be written; EnvironmentFault if the disk is full or failing.
    """
    try:
        if target.is_dir():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".draft-", dir=target.parent) as scratch:
            draft = Path(scratch, target.name)
            draft.mkdir()
            fill(draft)
            try:
                draft.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    except OSError as error:
        # A disk may be less full tomorrow; a wrong path stays wrong.
        fault = EnvironmentFault if error.errno in (ENOSPC, EDQUOT, EIO) else MuonlabError
        raise fault(
            f"cannot write to the data cache {target.parent}: {error.strerror or error}; "
            "set cache= or $MUONLAB_CACHE to a folder that can be written"
        ) from error


def tokenize(corpus: Corpus, tokenizer: ByteTokenizer | BytePairTokenizer, cache: CachePath) -> TokenData:
    """The tokens of `corpus`, mapped from the cache; tokenized first if they are not in it.

    An entry is a folder `tokens/<name>-<tokenizer>-<key>` with train.bin and val.bin (raw ids), meta.json
    and, for BPE, tokenizer.json; the key is a digest of the source and the tokenizer. BPE learns its merges
    from the training split alone. Raises MuonlabError for an empty split.
    """
    made_of: list[object] = [FORMAT, corpus.digest, tokenizer.key]
    if isinstance(tokenizer, BytePairTokenizer) and corpus.has_long_runs():
        made_of.append(RUN_BYTES)  # where they are cut decides the ids of this text, and of no other
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    folder = cache_folder(cache) / "tokens" / f"{corpus.name}-{tokenizer.name}-{key}"
    build_folder(folder, lambda draft: _write_tokens(draft, corpus, tokenizer))
    entropies = corpus.conditional_entropies()
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if isinstance(tokenizer, BytePairTokenizer):
            tokenizer.load(folder, meta["vocab_size"])
        return TokenData(
            name=corpus.name,
            source=corpus.source,
            train=_map_tokens(folder, "train", meta["train_tokens"], tokenizer.dtype),
            val=_map_tokens(folder, "val", meta["val_tokens"], tokenizer.dtype),
            vocab_size=meta["vocab_size"],
            digest=meta["digest"],
            bytes_per_token=meta["val_bytes"] / meta["val_tokens"],
            tokenizer=tokenizer,
            conditional_entropies=entropies,
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise damaged(folder) from None


def _write_tokens(draft: Path, corpus: Corpus, tokenizer: ByteTokenizer | BytePairTokenizer) -> None:
    meta: dict[str, object] = {"name": corpus.name, "source": corpus.source, "tokenizer": tokenizer.key}
    digest = hashlib.sha256()
    if isinstance(tokenizer, BytePairTokenizer):
        log.info("training a byte-pair tokenizer of %s entries on %s", tokenizer.vocab_size, corpus.name)
        tokenizer.train(corpus.train())
        tokenizer.save(draft)
    log.info("tokenizing %s", corpus.name)
    for split, text in (("train", corpus.train), ("val", corpus.val)):
        tokens, size = _write_split(
            draft / f"{split}.bin", _progress(split, tokenizer.encode(text())), digest
        )
        if tokens == 0:
            raise MuonlabError(f"data '{corpus.name}' ({corpus.source}) has an empty {split} split")
        meta |= {f"{split}_tokens": tokens, f"{split}_bytes": size}
    meta |= {"vocab_size": tokenizer.vocab_size, "digest": digest.hexdigest()[:16]}
    (draft / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _write_split(
    path: Path, encoded: Iterable[tuple[np.ndarray, int]], digest: "hashlib._Hash"
) -> tuple[int, int]:
    """Write the ids one after the other; returns the numbers of ids and of bytes of text."""
    tokens = size = 0
    with path.open("wb") as file:
        for ids, text_bytes in encoded:
            digest.update(ids.data)
            file.write(ids.data)
            tokens += len(ids)
            size += text_bytes
    return tokens, size


def _progress(split: str, encoded: Iterable[tuple[np.ndarray, int]]) -> Iterable[tuple[np.ndarray, int]]:
    """Pass through, counting bytes on a terminal; silent elsewhere."""
    from muonlab.progress import Progress

    with Progress(desc=split, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for ids, size in encoded:
            yield ids, size
            bar.update(size)


def _map_tokens(folder: Path, split: str, tokens: int, dtype: np.dtype) -> np.ndarray:
    path = folder / f"{split}.bin"
    if not path.is_file() or path.stat().st_size != tokens * dtype.itemsize:
        raise damaged(folder)
    # A plain array over the mapping: indexing np.memmap itself costs microseconds more each time.
    return np.asarray(np.memmap(path, dtype, "r"))


def damaged(folder: Path) -> MuonlabError:
    """The error for an entry that differs from what was written."""
    return MuonlabError(f"the data cache entry {folder} is damaged; delete it, and it will be made again")
