"""Token ids of a corpus and the order in which training and validation see them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from muonlab.data.tokenizer import BytePairTokenizer, ByteTokenizer
from muonlab.errors import MuonlabError

if TYPE_CHECKING:
    from torch import Tensor


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A cross-entropy in nats per token as bits per byte of text, the unit that tokenizers share.

    Divide by ln 2 to turn nats into bits and by the mean number of bytes per token. Take
    `bytes_per_token` from the split that the loss was measured on (`TokenData.bytes_per_token` is that of the
    validation split).
    """
    return nats_per_token / math.log(2) / bytes_per_token


@dataclass(frozen=True, eq=False)
class TokenData:
    """Token ids of a training and a validation split.

    `train` and `val` are 1-D arrays of uint8 or uint16, mapped from the cache: processes on one machine share
    their pages. Ids lie in [0, vocab_size). `digest` (16 hex digits) is of the ids of both splits, so equal
    digests mean equal tokens. `source` names the origin of the text in one line. `bytes_per_token` is the
    mean number of bytes of text behind one token of the validation split.

    `conditional_entropies` is empty, except for a synthetic corpus: entry t - 1 is the exact entropy, in
    nats, of the next token given the last t, and the last entry is the entropy rate.
    """

    name: str
    source: str
    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    digest: str
    bytes_per_token: float
    tokenizer: ByteTokenizer | BytePairTokenizer
    conditional_entropies: tuple[float, ...] = ()

    def batch(
        self, seed: int, index: int, batch_size: int, context: int, sequential: bool = False
    ) -> "tuple[Tensor, Tensor]":
        """Training batch number `index` of the order `seed`: (tokens, targets), int64 (batch_size, context).

        A pure function of its arguments: workers, devices, resumption and the batches drawn before cannot
        change it. The windows begin at independent uniform positions (with replacement: there are no epochs),
        and targets are the tokens one position later. `sequential` reads through the text instead, from a
        position drawn by the seed, so that neighbours in a batch are neighbours in the text; a window that would
        run over the end begins that much after the beginning. `seed` and `index` are in [0, 2^63).
        Raises MuonlabError if the training split has fewer than context + 1 tokens.
        """
        self._check_split("training", self.train, context)
        if min(seed, index) < 0 or batch_size < 1:
            raise MuonlabError(
                "a batch needs seed >= 0, index >= 0 and batch_size >= 1, "
                f"not {seed}, {index} and {batch_size}"
            )
        positions = len(self.train) - context
        if sequential:
            first = (
                np.random.Philox(key=np.array((seed, 0), np.uint64)).random_raw()
                + index * batch_size * context
            )
            starts = (first % positions + np.arange(batch_size) * context) % positions
            return _windows(self.train, starts, context)
        # Philox is counter-based, so (seed, index) as its key costs no stream to skip through. random_raw is
        # the part of numpy's generators whose values are promised never to change. The remainder favours low
        # positions by less than len / 2^64.
        draws = np.random.Philox(key=np.array((seed, index), np.uint64)).random_raw(batch_size)
        starts = (draws % np.uint64(positions)).astype(np.int64)
        return _windows(self.train, starts, context)

    def eval_batches(
        self, batch_size: int, context: int, max_batches: int | None = None
    ) -> "Iterator[tuple[Tensor, Tensor]]":
        """The same windows of the validation split every time, as (tokens, targets) pairs like `batch`.

        At most `max_batches` full batches (None: as many as fit), their windows spread evenly from the first
        token to the last, in order. No token is a target twice. Batches are full, so the mean of their losses
        is the mean over windows; only a split with fewer windows than one batch gives a single smaller one.
        Raises MuonlabError if the validation split has fewer than context + 1 tokens.
        """
        self._check_split("validation", self.val, context)
        if batch_size < 1 or (max_batches is not None and max_batches < 1):
            raise MuonlabError(
                f"validation needs batch_size >= 1 and max_batches >= 1, not {batch_size} and {max_batches}"
            )
        last = len(self.val) - 1 - context
        fit = last // context + 1
        batches = fit // batch_size if max_batches is None else min(fit // batch_size, max_batches)
        windows = batches * batch_size or fit
        # fit windows of `context` are room for a spacing of at least `context`: rounding down keeps that.
        starts = np.arange(windows) * last // max(windows - 1, 1)
        for first in range(0, windows, batch_size):
            yield _windows(self.val, starts[first : first + batch_size], context)

    def check_context(self, context: int) -> None:
        """Raise MuonlabError unless both splits hold at least one window of `context` tokens and a target."""
        self._check_split("training", self.train, context)
        self._check_split("validation", self.val, context)

    def _check_split(self, split: str, tokens: np.ndarray, context: int) -> None:
        if context < 1:
            raise MuonlabError(f"context must be at least 1 token, not {context}")
        if len(tokens) <= context:
            raise MuonlabError(
                f"context {context} needs {context + 1:,} tokens, but the {split} split of data "
                f"'{self.name}' ({self.source}) has {len(tokens):,}; shorten the context or give more text"
            )

    @property
    def entropy_rate(self) -> float | None:
        """Exact entropy rate in nats per token, or None where it is unknown (natural text)."""
        return self.conditional_entropies[-1] if self.conditional_entropies else None

    def loss_floor(self, context: int) -> float | None:
        """The least mean loss, in nats per token, that any model can expect on windows of `context` tokens.

        Position t of a window has seen t tokens only, so the first ones cannot reach the entropy rate of a
        chain of higher order. None where it is unknown (natural text).
        """
        if not self.conditional_entropies:
            return None
        early = self.conditional_entropies[:context]
        return (sum(early) + (context - len(early)) * early[-1]) / context

    def decode(self, ids: "np.ndarray | Tensor") -> str:
        """The text behind a 1-D array of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(ids.tolist())

    def describe(self) -> dict[str, str | int | float | None]:
        """The data as a run's record describes it: plain values only."""
        return {
            "name": self.name,
            "source": self.source,
            "digest": self.digest,
            "tokenizer": self.tokenizer.key,
            "vocab_size": self.vocab_size,
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "bytes_per_token": self.bytes_per_token,
            "entropy_rate": self.entropy_rate,
        }


def _windows(tokens: np.ndarray, starts: np.ndarray, context: int) -> "tuple[Tensor, Tensor]":
    """Gather tokens[s : s + context] and its shift by one for every s of `starts`."""
    # Imported here, so that a corpus is made ready and its digest taken without torch.
    from torch import from_numpy

    windows = from_numpy(tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
