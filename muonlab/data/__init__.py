"""Corpora, tokenizers and the deterministic batch order.

`build_data(name, **settings)` returns a `TokenData`: two memory-mapped arrays of token ids, and batches that are a pure
function of (seed, index). The slow steps, fetching and tokenizing, happen once and are kept in the cache.
`open_corpus` stops before the tokens, when the digest of the corpus is known. Torch is imported with the first batch.
"""

from muonlab.data.corpus import Corpus
from muonlab.data.registry import DATA, build_data, corpus_digest, list_data, make_data, open_corpus
from muonlab.data.token_data import TokenData, bits_per_byte

__all__ = [
    "DATA",
    "Corpus",
    "TokenData",
    "bits_per_byte",
    "build_data",
    "corpus_digest",
    "list_data",
    "make_data",
    "open_corpus",
]
