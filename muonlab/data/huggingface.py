"""A dataset of the Hugging Face hub by name, for machines with a network; needs the extra `muonlab[hub]`."""

import hashlib
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from muonlab.data.cache import CachePath, build_folder, cache_folder, damaged
from muonlab.data.corpus import Corpus
from muonlab.data.spans import have_long_runs, read_spans, whole
from muonlab.errors import MuonlabError, unknown_name
from muonlab.settings.data import HuggingFaceSettings

log = logging.getLogger(__name__)

# Short names: (dataset, subset).
PRESETS = {
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "tinystories": ("roneneldan/TinyStories", None),
}
# Ends each document. No text holds a zero byte, so a model sees where one ends under either tokenizer.
END_OF_DOCUMENT = b"\0"
NETWORK_SECONDS = 10


def open_huggingface(cache: CachePath, settings: HuggingFaceSettings) -> Corpus:
    """The first documents of a dataset, streamed into the cache until they reach `max_bytes`.

    `dataset` is "fineweb_edu" (its sample-10BT), "tinystories", any "owner/name" of the hub, or a local
    folder that the datasets library can read. `field` is the column with the text. `revision` pins a commit
    of the dataset; None takes the newest, once: the cached text stays, even if a local folder changes.
    Every n-th document is held out, with n nearest to 1 / `val_fraction` (over 0, at most 0.5); a zero byte
    ends each document.
    Raises MuonlabError if the package is missing, the hub cannot be reached, or it refuses the request.
    """
    s = settings
    full_name, subset = _resolve(s.dataset, s.subset)
    request = {"name": subset, "split": s.split, "revision": s.revision}
    identity = json.dumps([{"path": full_name, **request}, s.field, s.max_bytes, s.val_fraction])
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = cache_folder(cache) / "huggingface" / f"{Path(full_name).name}-{key}"
    build_folder(
        folder,
        lambda draft: write_documents(
            _stream(full_name, request, s.field), draft, s.max_bytes, s.val_fraction
        ),
    )
    try:
        digest = (folder / "sha256").read_text()
        train, val = whole(folder / "train.txt"), whole(folder / "val.txt")
    except (OSError, ValueError):
        raise damaged(folder) from None
    return Corpus(
        name="huggingface",
        source=" ".join(str(part) for part in (full_name, subset, s.split, s.revision) if part),
        digest=digest,
        train=lambda: read_spans([train]),
        val=lambda: read_spans([val]),
        has_long_runs=lambda: have_long_runs([train, val]),
    )


def write_documents(documents: Iterable[str], folder: Path, max_bytes: int, val_fraction: float) -> None:
    """Write whole documents to train.txt and val.txt in `folder` until both together hold `max_bytes`.

    The file sha256 gets the digest of what was written, in its order. Raises MuonlabError if there were too
    few documents to fill both splits.
    """
    every = round(1 / val_fraction)
    digest = hashlib.sha256()
    written = 0
    index = -1
    with (folder / "train.txt").open("wb") as train, (folder / "val.txt").open("wb") as val:
        for index, document in enumerate(documents):
            text = document.encode() + END_OF_DOCUMENT
            (val if index % every == every - 1 else train).write(text)
            digest.update(text)
            written += len(text)
            if written >= max_bytes:
                break
    if index + 1 < every:
        raise MuonlabError(
            f"{index + 1} documents are too few to hold out every {every}th; raise max_bytes or val_fraction"
        )
    (folder / "sha256").write_text(digest.hexdigest())


def _resolve(dataset: str, subset: str | None) -> tuple[str, str | None]:
    if dataset in PRESETS:
        full_name, preset_subset = PRESETS[dataset]
        return full_name, subset or preset_subset
    if "/" not in dataset and not os.path.isdir(dataset):
        raise unknown_name("Hugging Face dataset (a short name, owner/name or a folder)", dataset, PRESETS)
    return dataset, subset


def _stream(dataset: str, request: Mapping[str, str | None], field: str) -> Iterator[str]:
    """The texts of a dataset in its order, without downloading more than is read."""
    try:
        import datasets
    except ImportError:
        raise MuonlabError(
            "data 'huggingface' needs the package datasets, which is not installed; "
            "pip install 'muonlab[hub]'"
        ) from None
    if not os.path.isdir(dataset):
        _check_hub()
    log.info("streaming %s from the Hugging Face hub", dataset)
    try:
        for row in datasets.load_dataset(path=dataset, **request, streaming=True):
            if field not in row:
                raise unknown_name(f"field of dataset {dataset}", field, row)
            if not isinstance(row[field], str):
                kind = type(row[field]).__name__
                raise MuonlabError(f"the field '{field}' of dataset {dataset} holds {kind}, not text")
            yield row[field]
    except MuonlabError:
        raise
    except Exception as error:  # the library and the clients below it raise a dozen unrelated types
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise MuonlabError(f"cannot read the dataset {dataset}: {reason}") from error


def _check_hub() -> None:
    """Check that the hub answers at all: without a network the library itself retries for minutes."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=NETWORK_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, even if a refusal
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise MuonlabError(
            f"data 'huggingface' needs a network, but {hub} cannot be reached ({reason}); "
            "use data=shakespeare, data=synthetic or data=text"
        ) from None
