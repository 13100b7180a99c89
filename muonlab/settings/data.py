"""The settings of each corpus."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from muonlab.errors import MuonlabError
from muonlab.settings.check import Count, Seed

MAX_STATES = 1024  # of a synthetic chain
Tokens = Annotated[int, Ge(1), Le(10**9)]


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """tokenizer: "byte" (256 tokens) or "bpe", trained on the training split, with `bpe_vocab_size` tokens: 256 bytes
    and the merges; unused with byte."""

    tokenizer: Literal["byte", "bpe"] = "byte"
    bpe_vocab_size: Annotated[int, Ge(257), Le(1 << 16)] = 1024


@dataclass(frozen=True, kw_only=True)
class ShakespeareSettings(TokenizerSettings):
    """The plays and poems of Shakespeare."""

    name: Literal["shakespeare"] = "shakespeare"


@dataclass(frozen=True, kw_only=True)
class EnglishSettings(TokenizerSettings):
    """Shakespeare, Milton and the King James Bible."""

    name: Literal["english"] = "english"


@dataclass(frozen=True, kw_only=True)
class TextSettings(TokenizerSettings):
    """The text at `path`: a file with any name, or every *.txt below a folder, sorted by path. The last
    `val_fraction` of it is held out."""

    name: Literal["text"] = "text"
    path: str | None = None
    val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1

    def __post_init__(self) -> None:
        if not self.path:
            raise MuonlabError(
                "data 'text' needs a text file or a folder of .txt files, as in data.path=input.txt"
            )


@dataclass(frozen=True, kw_only=True)
class PackedSettings:
    """The tokens in the file at `path`, which `python -m muonlab.data pack` made; no text and no network is needed."""

    name: Literal["tokens"] = "tokens"
    path: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise MuonlabError(
                "data 'tokens' needs a file of packed tokens, as in data.path=corpus.tokens;"
                " python -m muonlab.data pack makes one"
            )


@dataclass(frozen=True, kw_only=True)
class SyntheticSettings:
    """A Markov chain of known entropy: `vocab_size` symbols, each depending on the last `order`; the rows of its
    transition matrix are Dirichlet draws with `concentration`: near 0 almost deterministic, large nearly uniform.
    `seed` draws chain and text, independently of the run's seed."""

    name: Literal["synthetic"] = "synthetic"
    vocab_size: Annotated[int, Ge(2), Le(256)] = 32
    order: Count = 2
    concentration: Annotated[float, Gt(0), Le(1e9)] = 0.1
    train_tokens: Tokens = 1_000_000
    val_tokens: Tokens = 100_000
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.order > MAX_STATES.bit_length() or self.vocab_size**self.order > MAX_STATES:
            raise MuonlabError(
                f"data.order={self.order} of data.vocab_size={self.vocab_size} makes more than {MAX_STATES} states"
                " (vocab_size^order); lower one of them"
            )


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSettings(TokenizerSettings):
    """The first documents of a dataset of the Hugging Face hub; `dataset` is "fineweb_edu", "tinystories", "owner/name"
    or a local folder, `subset` its configuration, `field` the column with the text, `revision` its commit (None: the
    newest when it is first fetched), `max_bytes` where streaming ends. Every n-th document is held out, with n nearest
    to 1 / `val_fraction`."""

    name: Literal["huggingface"] = "huggingface"
    dataset: str = "fineweb_edu"
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    revision: str | None = None
    max_bytes: Count = 100_000_000
    val_fraction: Annotated[float, Gt(0), Le(0.5)] = 0.05


DATA_SETTINGS: dict[str, type] = {
    "shakespeare": ShakespeareSettings,
    "english": EnglishSettings,
    "text": TextSettings,
    "tokens": PackedSettings,
    "synthetic": SyntheticSettings,
    "huggingface": HuggingFaceSettings,
}
