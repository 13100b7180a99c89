"""Text whose entropy rate is known exactly: a Markov chain over a small alphabet."""

import hashlib
from functools import cache as remember
from itertools import chain

import numpy as np

from muonlab.data.cache import CachePath
from muonlab.data.corpus import Corpus
from muonlab.settings.data import SyntheticSettings

# Every probability is a multiple of 1/4096, so that 12 random bits choose the next symbol exactly as the
# matrix says, and the matrix's entropy is the text's.
SLOTS = 1 << 12
BLOCK = 1 << 20  # symbols drawn at once


def open_synthetic(cache: CachePath, settings: SyntheticSettings) -> Corpus:
    """A chain in which each symbol depends on the last `order`; a symbol is a token, and counts as a byte.

    `vocab_size` symbols (2 to 256), at most 1024 states vocab_size^order. The rows of the transition matrix
    are Dirichlet draws: a small `concentration` makes the next symbol nearly certain (entropy towards 0), a
    large one nearly uniform (towards log vocab_size). `seed` draws matrix and text. The validation split
    continues the text of the training split.

    The result knows its `entropy_rate` and `loss_floor(context)` in nats per token. Order 1 needs no
    attention; order 2 needs a head that looks one token back.
    """
    s = settings
    counts = transition_counts(s.vocab_size, s.order, s.concentration, s.seed)
    text = remember(lambda: generate(counts, s.train_tokens + s.val_tokens, s.seed))
    made_of = f"vocab_size={s.vocab_size} order={s.order} concentration={s.concentration} seed={s.seed}"
    # The chain is part of the digest, because another release of numpy may draw another one from the same seed.
    identity = counts.tobytes() + f"{made_of} {s.train_tokens} {s.val_tokens}".encode()
    return Corpus(
        name="synthetic",
        source=f"Markov chain, {made_of}",
        digest=hashlib.sha256(identity).hexdigest(),
        train=lambda: [text()[: s.train_tokens]],
        val=lambda: [text()[s.train_tokens :]],
        symbols=s.vocab_size,
        conditional_entropies=lambda: conditional_entropies(counts),
    )


def transition_counts(vocab_size: int, order: int, concentration: float, seed: int) -> np.ndarray:
    """The chain: int64 (vocab_size^order, vocab_size), rows summing to 4096, P(next | state) = counts / 4096.

    A state is the last `order` symbols read as a number in base `vocab_size`, the oldest first. No count is
    0, so every state is reached from every other and the stationary distribution is unique.
    """
    rows = _random(seed, 0).dirichlet(np.full(vocab_size, concentration), vocab_size**order)
    counts = 1 + (rows * (SLOTS - vocab_size)).astype(np.int64)
    # The remainder after rounding down goes to each row's likeliest symbol.
    np.put_along_axis(
        counts,
        rows.argmax(1)[:, None],
        (counts.max(1) + SLOTS - counts.sum(1))[:, None],
        axis=1,
    )
    return counts


def stationary(counts: np.ndarray) -> np.ndarray:
    """The distribution over states, float64 (states,), with pi = pi P and sum(pi) = 1.

    Solved, not iterated: with a small concentration the chain is nearly periodic or nearly reducible, and power
    iteration converges only as fast as the chain mixes.
    """
    states, vocab = counts.shape
    symbols = np.arange(vocab)
    balance = np.zeros((states, states))
    for state in range(states):
        # Dropping the oldest symbol and adding x leads to the state's other symbols followed by x.
        balance[(state * vocab + symbols) % states, state] = counts[state] / SLOTS
    balance -= np.eye(states)
    # One balance equation follows from the others; the sum takes its place.
    balance[-1] = 1
    pi = np.linalg.solve(balance, np.eye(states)[-1]).clip(0)
    return pi / pi.sum()


def conditional_entropies(counts: np.ndarray) -> tuple[float, ...]:
    """H(next | last t symbols) in nats for t = 1 .. order, under the stationary distribution.

    The last is the entropy rate: H = - sum_s pi(s) sum_x P(x|s) log P(x|s) (Cover & Thomas, Elements of
    Information Theory, 2nd ed., theorem 4.2.4).
    """
    states, vocab = counts.shape
    joint = stationary(counts)[:, None] * counts / SLOTS
    entropies = []
    known = vocab
    while known <= states:
        # Sum over the symbols that are further back than the t known ones.
        seen = joint.reshape(-1, known, vocab).sum(0)
        entropies.append(float(-(seen * np.log(seen / seen.sum(1, keepdims=True))).sum()))
        known *= vocab
    return tuple(entropies)


def generate(counts: np.ndarray, tokens: int, seed: int) -> bytes:
    """`tokens` consecutive symbols of the stationary chain, a byte each."""
    states, vocab = counts.shape
    symbols = np.tile(np.arange(vocab, dtype=np.uint8), states)
    table = [row.tobytes() for row in np.repeat(symbols, counts.ravel()).reshape(states, SLOTS)]
    random = _random(seed, 1)
    state = int(np.searchsorted(stationary(counts).cumsum(), random.random()))
    text = bytearray(tokens)
    slots = np.array_split(random.integers(SLOTS, size=tokens, dtype=np.uint16), 1 + tokens // BLOCK)
    # A plain loop: the chain is sequential, and a million symbols take a fraction of a second once per cache.
    for i, slot in enumerate(chain.from_iterable(block.tolist() for block in slots)):
        text[i] = symbol = table[state][slot]
        state = (state * vocab + symbol) % states
    return bytes(text)


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array((seed, stream), np.uint64)))
