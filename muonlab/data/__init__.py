"""Corpora, tokenizers and the deterministic batch order.

`build_data(name, **settings)` gives a `TokenData`: two memory-mapped arrays of token ids and batches that are
a pure function of (seed, index). What is slow (fetching, tokenizing) happens once and is kept in the cache.
"""

from typing import Any

from muonlab.data.books import build_english, build_shakespeare
from muonlab.data.huggingface import build_huggingface
from muonlab.data.synthetic import build_synthetic
from muonlab.data.text import build_text
from muonlab.data.token_data import TokenData, bits_per_byte
from muonlab.registry import Registry

__all__ = ["DATA", "TokenData", "bits_per_byte", "build_data", "list_data"]

DATA = Registry("data")
DATA.register("shakespeare")(build_shakespeare)
DATA.register("english")(build_english)
DATA.register("synthetic")(build_synthetic)
DATA.register("text")(build_text)
DATA.register("huggingface")(build_huggingface)


def build_data(name: str = "shakespeare", **settings: Any) -> TokenData:
    """The tokens of corpus `name`; `DATA.settings(name)` tells its settings and their defaults.

    Text corpora take `tokenizer` ("byte" or "bpe") and `bpe_vocab_size`; every corpus takes `cache`, the
    folder for what is kept between runs (None: $MUONLAB_CACHE, else .cache/muonlab under the current folder).
    Raises MuonlabError for an unknown name or setting, an unreadable source, or a cache that cannot be
    written.
    """
    return DATA.build(name, **settings)


def list_data() -> list[str]:
    """The names that `build_data` knows, sorted."""
    return DATA.names()
