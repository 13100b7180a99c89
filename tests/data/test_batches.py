import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.data import TokenData, bits_per_byte
from muonlab.data.tokenizer import ByteTokenizer
from muonlab.errors import MuonlabError


def token_data(train=1000, val=1000, **fields):
    """Token i of each split is i, so that a token shows its own position."""
    made = {"name": "made", "source": "arange", "vocab_size": 65536, "digest": "0", "bytes_per_token": 1.0}
    arrays = {"train": np.arange(train, dtype=np.uint16), "val": np.arange(val, dtype=np.uint16)}
    return TokenData(**(made | arrays | {"tokenizer": ByteTokenizer()} | fields))


def plain_batch(data, seed, index, batch_size, context):
    """The batch order as the docstring says it, one window at a time."""
    random = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    tokens, targets = [], []
    for _ in range(batch_size):
        start = random.random_raw() % (len(data.train) - context)
        tokens.append(data.train[start : start + context].tolist())
        targets.append(data.train[start + 1 : start + 1 + context].tolist())
    return torch.tensor(tokens), torch.tensor(targets)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    index=st.integers(0, 2**63 - 1),
    batch_size=st.integers(1, 40),
    context=st.integers(1, 80),
    spare=st.integers(1, 500),
)
def test_a_batch_is_the_plain_loop_over_windows(seed, index, batch_size, context, spare):
    data = token_data(train=context + spare)
    tokens, targets = data.batch(seed, index, batch_size, context)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.is_contiguous()
    assert targets.is_contiguous()
    plain_tokens, plain_targets = plain_batch(data, seed, index, batch_size, context)
    assert torch.equal(tokens, plain_tokens)
    assert torch.equal(targets, plain_targets)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    index=st.integers(0, 2**63 - 2),
    batch_size=st.integers(1, 40),
    context=st.integers(1, 80),
    spare=st.integers(1, 500),
)
def test_a_sequential_batch_reads_on_through_the_text(seed, index, batch_size, context, spare):
    data = token_data(train=context + spare)
    tokens, targets = data.batch(seed, index, batch_size, context, sequential=True)
    following = data.batch(seed, index + 1, batch_size, context, sequential=True)[0]
    starts = torch.cat((tokens, following))[:, 0]
    assert ((starts.diff() - context) % spare == 0).all()
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(context))
    assert torch.equal(targets, tokens + 1)


def test_sequential_batches_of_two_seeds_begin_apart():
    data = token_data(train=60_000)
    assert len({int(data.batch(seed, 0, 1, 8, sequential=True)[0][0, 0]) for seed in range(50)}) > 45


def test_a_batch_does_not_depend_on_the_batches_before_it():
    data = token_data()
    alone = data.batch(3, 7, 16, 64)[0]
    for index in (9, 2, 7, 0):
        data.batch(3, index, 5, 10)
    assert torch.equal(data.batch(3, 7, 16, 64)[0], alone)
    assert torch.equal(data.batch(3, 7, 4, 64)[0], alone[:4])


def test_seeds_and_indices_give_different_batches():
    data = token_data(train=60_000)
    firsts = {tuple(data.batch(s, i, 8, 64)[0][:, 0].tolist()) for s in range(20) for i in range(20)}
    assert len(firsts) == 400


def test_starts_are_uniform_over_every_possible_position():
    context, positions, draws = 16, 50, 100_000
    starts = token_data(train=context + positions).batch(0, 0, draws, context)[0][:, 0]
    counts = torch.bincount(starts, minlength=positions)
    assert len(counts) == positions
    expected = draws / positions
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # Mean positions - 1, standard deviation sqrt(2 (positions - 1)).
    assert abs(chi_square - (positions - 1)) < 5 * math.sqrt(2 * (positions - 1))


@settings(deadline=None)
@given(
    tokens=st.integers(2, 2000),
    context=st.integers(1, 100),
    batch_size=st.integers(1, 20),
    max_batches=st.none() | st.integers(1, 12),
)
def test_evaluation_windows_spread_over_the_split_without_overlap(tokens, context, batch_size, max_batches):
    data = token_data(val=tokens)
    if tokens <= context:
        with pytest.raises(MuonlabError, match=f"context {context} needs .* the validation split"):
            next(data.eval_batches(batch_size, context, max_batches))
        return
    batches = list(data.eval_batches(batch_size, context, max_batches))
    starts = torch.cat([window[:, 0] for window, _ in batches])
    for window, targets in batches:
        assert torch.equal(window, window[:, :1] + torch.arange(context))
        assert torch.equal(targets, window + 1)
    fit = (tokens - 1) // context
    if fit < batch_size:
        assert [len(window) for window, _ in batches] == [fit]
    else:
        assert {len(window) for window, _ in batches} == {batch_size}
        assert len(batches) == min(fit // batch_size, max_batches or fit)
    gaps = starts.diff()
    assert starts[0] == 0
    if len(gaps):
        assert starts[-1] == tokens - 1 - context
        assert gaps.min() >= context
        assert gaps.max() - gaps.min() <= 1
    again = torch.cat([window[:, 0] for window, _ in data.eval_batches(batch_size, context, max_batches)])
    assert torch.equal(starts, again)


def test_a_context_longer_than_a_split_is_one_sentence():
    data = token_data(train=100, val=65)
    data.check_context(64)
    with pytest.raises(MuonlabError, match=r"^context 65 needs 66 tokens, .* validation split .* has 65;"):
        data.check_context(65)
    with pytest.raises(MuonlabError, match=r"^context 100 needs 101 tokens, .* training split .* has 100;"):
        data.batch(0, 0, 1, 100)
    with pytest.raises(MuonlabError, match="at least 1 token, not 0"):
        data.check_context(0)


@pytest.mark.parametrize(("seed", "index", "batch_size"), [(-1, 0, 1), (0, -1, 1), (0, 0, 0)])
def test_a_batch_refuses_what_has_no_meaning(seed, index, batch_size):
    with pytest.raises(MuonlabError, match=f"not {seed}, {index} and {batch_size}"):
        token_data().batch(seed, index, batch_size, 8)


@pytest.mark.parametrize(("batch_size", "max_batches"), [(0, None), (1, 0)])
def test_validation_refuses_to_be_empty(batch_size, max_batches):
    with pytest.raises(MuonlabError, match=f"not {batch_size} and {max_batches}"):
        next(token_data().eval_batches(batch_size, 8, max_batches))


def test_bits_per_byte_of_a_uniform_guess():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8)
    # Two bytes a token, one token of 65,536: the same eight bits a byte.
    assert bits_per_byte(math.log(65536), 2.0) == pytest.approx(8)


def test_what_the_record_says_is_plain():
    described = token_data(train=10, val=20).describe()
    assert described["train_tokens"] == 10
    assert described["val_tokens"] == 20
    assert described["entropy_rate"] is None
    assert all(isinstance(value, str | int | float | None) for value in described.values())
    assert token_data().loss_floor(8) is None
