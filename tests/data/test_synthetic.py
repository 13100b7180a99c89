import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.data import build_data, corpus_digest
from muonlab.data.synthetic import SLOTS, conditional_entropies, generate, stationary, transition_counts
from muonlab.errors import MuonlabError
from muonlab.settings.check import build
from muonlab.settings.data import SyntheticSettings


def plain_entropies(counts, order):
    """Entropies of blocks of the chain, summed one block at a time: H(next | t) = H(t + 1) - H(t)."""
    states, vocab = counts.shape
    # The stationary distribution as the null vector of (P^T - I), stacked with sum(pi) = 1.
    transition = np.zeros((states, states))
    for state, symbol in itertools.product(range(states), range(vocab)):
        transition[state, (state * vocab + symbol) % states] += counts[state, symbol] / SLOTS
    system = np.vstack([transition.T - np.eye(states), np.ones(states)])
    pi = np.linalg.lstsq(system, np.append(np.zeros(states), 1.0), rcond=None)[0]
    blocks = {}
    for state, symbol in itertools.product(range(states), range(vocab)):
        digits = (*tuple(state // vocab ** (order - 1 - i) % vocab for i in range(order)), symbol)
        for t in range(1, order + 2):
            blocks.setdefault(t, {}).setdefault(digits[-t:], 0.0)
            blocks[t][digits[-t:]] += pi[state] * counts[state, symbol] / SLOTS
    entropy = {t: -math.fsum(p * math.log(p) for p in block.values()) for t, block in blocks.items()}
    return pi, [entropy[t + 1] - entropy[t] for t in range(1, order + 1)]


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(2, 1), (7, 1), (40, 1), (2, 4), (3, 2), (6, 2), (4, 3)]),
    concentration=st.floats(0.02, 20),
    seed=st.integers(0, 2**62),
)
def test_entropies_equal_the_sum_over_blocks(shape, concentration, seed):
    vocab, order = shape
    counts = transition_counts(vocab, order, concentration, seed)
    assert counts.shape == (vocab**order, vocab)
    assert counts.min() >= 1
    assert (counts.sum(1) == SLOTS).all()
    pi, entropies = plain_entropies(counts, order)
    np.testing.assert_allclose(stationary(counts), pi, atol=1e-10)
    np.testing.assert_allclose(conditional_entropies(counts), entropies, atol=1e-10)


def test_a_symmetric_chain_has_the_entropy_of_its_coin():
    stay = 0.75
    counts = np.array([[3072, 1024], [1024, 3072]])
    coin = -stay * math.log(stay) - (1 - stay) * math.log(1 - stay)
    assert conditional_entropies(counts) == pytest.approx((coin,), abs=1e-14)


def test_concentration_moves_the_entropy_between_its_bounds():
    rates = [conditional_entropies(transition_counts(16, 1, c, 0))[-1] for c in (0.001, 0.1, 1.0, 1000.0)]
    assert rates == sorted(rates)
    assert rates[0] < 0.1
    assert rates[-1] == pytest.approx(math.log(16), abs=0.01)


@pytest.mark.parametrize(("vocab", "order"), [(8, 1), (8, 2), (4, 3)])
def test_the_text_reaches_its_entropy_rate(vocab, order):
    counts, tokens = transition_counts(vocab, order, 0.5, 1), 300_000
    text = np.frombuffer(generate(counts, tokens, 1), np.uint8).astype(np.int64)
    rate = conditional_entropies(counts)[-1]
    states = sum(text[i : tokens - order + i] * vocab ** (order - 1 - i) for i in range(order))
    following = text[order:]
    # The chain's own log loss on the text is a mean with the entropy rate as its expectation.
    losses = -np.log(counts[states, following] / SLOTS)
    # Half of the tokens' worth of samples allows for the correlation between neighbours.
    assert losses.mean() == pytest.approx(rate, abs=5 * losses.std() / math.sqrt(tokens / 2))
    # An estimate that never saw the matrix: the entropy of the observed (order + 1)-grams.
    grams = np.bincount(states * vocab + following, minlength=vocab ** (order + 1)).reshape(-1, vocab)
    observed = grams / grams.sum(1, keepdims=True).clip(1)
    present = grams > 0
    estimate = -(grams[present] * np.log(observed[present])).sum() / grams.sum()
    assert estimate == pytest.approx(rate, abs=0.01)


def test_the_text_begins_where_the_chain_lives():
    counts = transition_counts(4, 1, 0.05, 3)
    firsts = np.array([generate(counts, 1, seed)[0] for seed in range(2000)])
    expected = stationary(counts)
    deviation = np.bincount(firsts, minlength=4) / 2000 - expected
    assert (np.abs(deviation) < 5 * np.sqrt(expected / 2000)).all()


def test_the_corpus_is_its_settings(tmp_path):
    made = {"vocab_size": 5, "order": 2, "train_tokens": 2000, "val_tokens": 300, "cache": tmp_path}
    data = build_data("synthetic", **made)
    assert (len(data.train), len(data.val), data.vocab_size) == (2000, 300, 5)
    assert data.train.max() < 5
    assert data.bytes_per_token == 1
    again = build_data("synthetic", **made | {"cache": tmp_path / "other"})
    assert again.digest == data.digest
    assert build_data("synthetic", seed=1, **made).digest != data.digest
    longer = build_data("synthetic", **made | {"train_tokens": 2100, "val_tokens": 200})
    assert np.array_equal(longer.train[:2000], data.train)
    assert np.array_equal(longer.train[2000:], data.val[:100])


def test_the_floor_of_a_window_counts_its_blind_first_positions(tmp_path):
    data = build_data("synthetic", vocab_size=4, order=3, train_tokens=100, val_tokens=100, cache=tmp_path)
    one, two, three = data.conditional_entropies
    assert one > two > three == data.entropy_rate
    assert data.loss_floor(1) == pytest.approx(one)
    assert data.loss_floor(2) == pytest.approx((one + two) / 2)
    assert data.loss_floor(64) == pytest.approx((one + two + 62 * three) / 64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocab_size": 1}, "data.vocab_size must be .* at least 2 and at most 256, not 1"),
        ({"vocab_size": 257}, "data.vocab_size must be .* at least 2 and at most 256, not 257"),
        ({"order": 0}, "data.order must be a whole number of at least 1, not 0"),
        ({"order": 3}, "data.order=3 of data.vocab_size=32 makes more than 1024 states"),
        ({"order": 10**9}, "makes more than 1024 states"),
        ({"concentration": 0.0}, "data.concentration must be a number above 0 .*, not 0.0"),
        (
            {"concentration": 1e307},
            "data.concentration must be a number above 0 and at most 1e[+]09, not 1e[+]307",
        ),
        ({"seed": -1}, "data.seed must be a whole number of at least 0, not -1"),
        ({"val_tokens": 0}, "data.val_tokens must be a whole number of at least 1 .*, not 0"),
        (
            {"train_tokens": 10**15},
            "data.train_tokens must be .* at most 1,000,000,000, not 1000000000000000",
        ),
    ],
)
def test_settings_out_of_range_are_one_sentence(wrong, message, tmp_path):
    with pytest.raises(MuonlabError, match=message):
        build_data("synthetic", cache=tmp_path, **wrong)


def test_the_digest_needs_no_text(monkeypatch):
    monkeypatch.setattr("muonlab.data.synthetic.generate", lambda *_: pytest.fail("generated"))
    settings = build(SyntheticSettings, {"train_tokens": 10**9}, "data")
    assert len(corpus_digest(settings)) == 16
