"""How text is cut: ordinary text before white space alone, long runs without any at a bounded length."""

import random
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from muonlab.data import build_data
from muonlab.data.corpus import PIECE_BYTES, RUN_BYTES, long_runs, pieces
from muonlab.data.tokenizer import BytePairTokenizer

WHITE_SPACE = b" \n\r\t"


def plain_pieces(text):
    """As every text was cut before there was a bound: before the first white space after PIECE_BYTES."""
    start = 0
    while start < len(text):
        places = (i for i in range(start + PIECE_BYTES, len(text)) if text[i] in WHITE_SPACE)
        cut = next(places, len(text))
        yield text[start:cut]
        start = cut


def play(size, seed=0):
    """Words of a Zipf-like distribution in lines of speech, as a play has them, with indents and empty lines."""
    drawn = random.Random(seed)
    words = ["".join(drawn.choices("etaoinshrdlu'é", k=drawn.randint(1, 12))) for _ in range(2000)]
    weights = [1 / rank for rank in range(1, 2001)]
    lines = []
    while sum(map(len, lines)) < size:
        spoken = " ".join(drawn.choices(words, weights, k=drawn.randint(1, 9)))
        lines.append(
            drawn.choice(["", "   ", "\t", "\n\n"])
            + spoken
            + drawn.choice([".", ",", "!", "--", " 1603"])
            + "\n"
        )
    return "".join(lines).encode()


def test_ordinary_text_is_cut_as_it_always_was():
    text = play(300_000)
    assert not list(long_runs(text, 0, len(text)))
    assert list(pieces(text)) == list(plain_pieces(text))
    assert len(list(pieces(text))) == 5


def ids(tokenizer, cut):
    return np.concatenate([ids for ids, _ in tokenizer.encode(cut)])


def test_ordinary_text_has_the_tokens_that_it_has_without_the_bound(tmp_path):
    text = play(200_000)
    plain = BytePairTokenizer(600)
    plain.train(plain_pieces(text[: int(len(text) * 0.9)]))
    (tmp_path / "play.txt").write_bytes(text)
    data = build_data(
        "text", path=tmp_path / "play.txt", tokenizer="bpe", bpe_vocab_size=600, cache=tmp_path / "cache"
    )
    assert data.vocab_size == plain.vocab_size == 600
    cut = len(text) - len(data.decode(data.val).encode())
    assert np.array_equal(data.train, ids(plain, plain_pieces(text[:cut])))
    assert np.array_equal(data.val, ids(plain, plain_pieces(text[cut:])))


def plain_long_runs(text):
    """One byte at a time."""
    first = 0
    for place in range(len(text) + 1):
        if place == len(text) or text[place] in WHITE_SPACE:
            if place - first > RUN_BYTES:
                yield first, place
            first = place + 1


LENGTHS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 70, RUN_BYTES - 1, RUN_BYTES, RUN_BYTES + 1, 3 * RUN_BYTES]),
        st.sampled_from(" \n\t"),
    ),
    max_size=8,
)


@given(LENGTHS, st.sampled_from(["a", "é", "漢", "😀", "a漢"]))
@example([(20 * RUN_BYTES, " ")], "漢")
def test_long_runs_are_found_and_cut_between_characters(lengths, letters):
    text = "".join((letters * length)[:length] + space for length, space in lengths).encode()
    runs = list(long_runs(text, 0, len(text)))
    assert runs == list(plain_long_runs(text))
    cut = list(pieces(text))
    assert b"".join(cut) == text
    assert all(piece.decode() for piece in cut)
    assert all(len(piece) <= PIECE_BYTES + RUN_BYTES for piece in cut)
    ends = set(np.cumsum([len(piece) for piece in cut]).tolist())
    for first, end in runs:
        inside = sorted({first, end} | {place for place in ends if first < place < end})
        assert max(np.diff(inside)) <= RUN_BYTES
    if not runs:
        assert cut == list(plain_pieces(text))


@given(st.binary(max_size=64), st.integers(1, 300))
def test_bytes_that_are_no_text_are_cut_too(unit, times):
    text = unit * times
    cut = list(pieces(text))
    assert b"".join(cut) == text
    assert b"".join(pieces(b"\x80" * 20_000)) == b"\x80" * 20_000
    assert list(pieces(b"")) == []


def test_a_range_of_a_text_is_cut_by_itself():
    text = play(10_000)
    assert b"".join(pieces(text, 1000, 2000)) == text[1000:2000]


def test_byte_pairs_of_a_megabyte_without_white_space_take_seconds(tmp_path):
    dna = "".join(random.Random(0).choices("ACGT", k=1_000_000))
    (tmp_path / "dna.txt").write_text(dna)
    begin = time.perf_counter()
    settings = {"path": tmp_path / "dna.txt", "tokenizer": "bpe", "bpe_vocab_size": 1024}
    data = build_data("text", cache=tmp_path / "cache", **settings)
    assert time.perf_counter() - begin < 60  # 2 s, and no end without the bound
    assert data.vocab_size == 1024
    assert data.decode(data.train) + data.decode(data.val) == dna


@pytest.mark.parametrize(("tokenizer", "same"), [("bpe", False), ("byte", True)])
def test_only_text_whose_tokens_the_bound_can_change_has_another_entry(
    tmp_path, monkeypatch, tokenizer, same
):
    def entries(path):
        cache = tmp_path / path.stem
        for bound in (RUN_BYTES, 10**6):
            monkeypatch.setattr("muonlab.data.corpus.RUN_BYTES", bound)
            build_data("text", path=path, tokenizer=tokenizer, bpe_vocab_size=300, cache=cache)
        return len(list((cache / "tokens").iterdir()))

    ordinary, run = tmp_path / "ordinary.txt", tmp_path / "run.txt"
    ordinary.write_bytes(play(20_000))
    run.write_bytes(play(10_000) + b"ACGT" * 2000)
    assert entries(ordinary) == 1
    assert entries(run) == (1 if same else 2)
