import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.data.corpus import pieces
from muonlab.data.tokenizer import BytePairTokenizer, ByteTokenizer, make_tokenizer
from muonlab.errors import MuonlabError
from muonlab.settings.data import ShakespeareSettings, SyntheticSettings

TEXT = b"Shall I compare thee to a summer's day? Thou art more lovely and more temperate.\n" * 20


def trained(vocab_size=300):
    tokenizer = BytePairTokenizer(vocab_size)
    tokenizer.train([TEXT])
    return tokenizer


def ids_of(tokenizer, text):
    encoded = list(tokenizer.encode(pieces(text)))
    assert sum(size for _, size in encoded) == len(text)
    return np.concatenate([np.empty(0, tokenizer.dtype), *(ids for ids, _ in encoded)])


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_byte_tokens_are_the_bytes(text):
    ids = ids_of(ByteTokenizer(), text)
    assert ids.dtype == np.uint8
    assert ids.tobytes() == text


BPE = trained()


@settings(deadline=None)
@given(st.text(max_size=200))
def test_byte_pairs_give_any_text_back(text):
    ids = ids_of(BPE, text.encode())
    assert BPE.decode(ids.tolist()) == text
    assert (ids < BPE.vocab_size).all()


def test_byte_pairs_learn_the_text_and_only_as_many_as_asked():
    assert BPE.vocab_size == 300
    assert len(ids_of(BPE, TEXT)) < len(TEXT) / 2
    assert len(ids_of(trained(260), TEXT)) > len(ids_of(BPE, TEXT))


def test_a_text_too_short_for_the_vocabulary_gives_fewer_tokens():
    tokenizer = BytePairTokenizer(5000)
    tokenizer.train([b"to be or not to be"])
    assert 256 < tokenizer.vocab_size < 300


def test_training_twice_gives_the_same_tokens(tmp_path):
    again = trained()
    assert np.array_equal(ids_of(BPE, TEXT), ids_of(again, TEXT))
    again.save(tmp_path)
    loaded = BytePairTokenizer(300)
    loaded.load(tmp_path, 300)
    assert np.array_equal(ids_of(BPE, TEXT), ids_of(loaded, TEXT))


def test_byte_pairs_refuse_text_that_is_not_utf8():
    with pytest.raises(MuonlabError, match=r"needs UTF-8 text.*\\xff.*use tokenizer=byte"):
        BytePairTokenizer(300).train([b"caf\xff"])


def test_a_section_without_a_tokenizer_has_bytes():
    assert make_tokenizer(SyntheticSettings(), 32).vocab_size == 32
    assert make_tokenizer(ShakespeareSettings()).vocab_size == 256
    assert make_tokenizer(ShakespeareSettings(tokenizer="bpe", bpe_vocab_size=300)).vocab_size == 300


def test_a_damaged_tokenizer_is_one_sentence(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    loaded = BytePairTokenizer(300)
    loaded.load(tmp_path, 300)
    with pytest.raises(MuonlabError, match=r"cannot read the tokenizer .*tokenizer.json: "):
        loaded.decode([3])
