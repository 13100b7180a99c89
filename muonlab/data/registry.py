"""Corpora by name: opened, so that their digest is known, then tokenized or read from the cache."""

import os

from muonlab.data.books import open_english, open_shakespeare
from muonlab.data.cache import CachePath, tokenize
from muonlab.data.corpus import Corpus
from muonlab.data.huggingface import open_huggingface
from muonlab.data.packed import Packed, open_packed
from muonlab.data.synthetic import open_synthetic
from muonlab.data.text import open_text
from muonlab.data.token_data import TokenData
from muonlab.data.tokenizer import make_tokenizer
from muonlab.registry import Registry
from muonlab.settings.check import Named, build

# An entry opens a corpus: it takes the cache's folder and its settings, and gives a Corpus, or tokens that exist.
DATA: Registry[Corpus | Packed] = Registry("data")
list_data = DATA.names
DATA.register("shakespeare")(open_shakespeare)
DATA.register("english")(open_english)
DATA.register("synthetic")(open_synthetic)
DATA.register("text")(open_text)
DATA.register("tokens")(open_packed)
DATA.register("huggingface")(open_huggingface)


def build_data(name: str = "shakespeare", cache: CachePath = None, **settings: object) -> TokenData:
    """The tokens of corpus `name`; `DATA.settings(name)` has its settings and their defaults.

    `cache` is the folder kept between runs (None: $MUONLAB_CACHE, else .cache/muonlab under the current
    folder). Raises MuonlabError for an unknown name or setting, a value out of range, an unreadable source, or a cache
    that cannot be written.
    """
    values = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in settings.items()}
    return make_data(build(DATA.section(name), values, "data"), cache)


def open_corpus(settings: Named, cache: CachePath = None) -> Corpus | Packed:
    """The corpus of a checked section, with its digest and without its tokens.

    Costs no more than reading the text once; a dataset of the hub is downloaded first, unless it is in the cache.
    Raises MuonlabError for an unreadable source.
    """
    return DATA.make(settings, cache)


def corpus_digest(settings: Named, cache: CachePath = None) -> str:
    """16 hex digits that distinguish the text of a checked section from any other, whatever its path and tokenizer."""
    return open_corpus(settings, cache).short_digest


def make_data(settings: Named, cache: CachePath = None, corpus: Corpus | Packed | None = None) -> TokenData:
    """The tokens of a checked section, from the cache or tokenized into it.

    `corpus` is the result of `open_corpus` for these settings, so that no text is read twice; None opens it. Raises
    MuonlabError for an unreadable source, a split without text, or a cache that cannot be written.
    """
    corpus = corpus or open_corpus(settings, cache)
    if isinstance(corpus, Packed):
        return corpus.tokens
    return tokenize(corpus, make_tokenizer(settings, corpus.symbols), cache)
