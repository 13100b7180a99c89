"""Tokens in one file: what comes out is what went in, and any other file is refused in one sentence."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muonlab.data import build_data, corpus_digest
from muonlab.data.__main__ import main
from muonlab.data.packed import _START, FORM, pack
from muonlab.errors import MuonlabError
from muonlab.settings.data import PackedSettings

TEXT = ("Is this a dagger which I see before me, the handle toward my hand? Là-bas, où? " * 90).encode()


@pytest.fixture
def corpus(tmp_path):
    """corpus(tokenizer) -> the tokens of a text."""
    (tmp_path / "input.txt").write_bytes(TEXT)

    def make(tokenizer="bpe"):
        given = {"path": tmp_path / "input.txt", "tokenizer": tokenizer, "bpe_vocab_size": 300}
        return build_data("text", cache=tmp_path / "cache", **given)

    return make


@pytest.mark.parametrize("tokenizer", ["bpe", "byte"])
def test_tokens_batches_and_text_are_those_that_were_packed(corpus, tmp_path, tokenizer):
    data, path = corpus(tokenizer), tmp_path / "corpus.tokens"
    assert pack(data, path) == path.stat().st_size
    read = build_data("tokens", path=path)
    assert np.array_equal(read.train, data.train)
    assert np.array_equal(read.val, data.val)
    kept = (
        "vocab_size",
        "digest",
        "bytes_per_token",
        "entropy_rate",
        "tokenizer",
        "train_tokens",
        "val_tokens",
    )
    assert {key: read.describe()[key] for key in kept} == {key: data.describe()[key] for key in kept}
    assert (read.name, read.source) == ("tokens", str(path))
    assert read.decode(read.val) == data.decode(data.val) != ""
    for one, other in zip(read.batch(3, 5, 4, 16), data.batch(3, 5, 4, 16), strict=True):
        assert one.equal(other)
    for one, other in zip(read.eval_batches(2, 16), data.eval_batches(2, 16), strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_a_chain_keeps_its_entropies(tmp_path):
    data = build_data("synthetic", order=1, train_tokens=500, val_tokens=100, cache=tmp_path / "cache")
    pack(data, tmp_path / "chain")
    assert build_data("tokens", path=tmp_path / "chain").conditional_entropies == data.conditional_entropies


def test_tokens_are_uint16_mapped_and_begin_at_a_multiple_of_64_bytes(corpus, tmp_path):
    path = tmp_path / "corpus.tokens"
    data = corpus()
    pack(data, path)
    read = build_data("tokens", path=path)
    assert read.train.dtype == read.val.dtype == np.dtype("<u2")
    assert not read.train.flags.writeable
    place = path.stat().st_size - 2 * (len(data.train) + len(data.val))
    assert place % 64 == 0
    assert np.array_equal(np.fromfile(path, "<u2", offset=place), np.concatenate([data.train, data.val]))


def test_the_same_tokens_give_the_same_file_and_the_digest_is_of_its_content(corpus, tmp_path):
    one, other, bytewise = (tmp_path / name for name in ("one", "other", "bytewise"))
    for path, tokenizer in ((one, "bpe"), (other, "bpe"), (bytewise, "byte")):
        pack(corpus(tokenizer), path)
    assert one.read_bytes() == other.read_bytes()
    digests = [corpus_digest(PackedSettings(path=str(path))) for path in (one, other, bytewise)]
    assert digests[0] == digests[1] != digests[2]
    assert one.read_bytes()[len(FORM) :].startswith(digests[0].encode())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bytewise",
        "cache",
        "input.txt",
        "one",
        "other",
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file that is whole, and its bytes."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "input.txt").write_bytes(TEXT)
    pack(build_data("text", path=folder / "input.txt", cache=folder / "cache"), folder / "whole")
    return folder, (folder / "whole").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_a_file_cut_short_lengthened_or_with_one_other_bit_is_refused(whole, data):
    folder, content = whole
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))])
    damaged = data.draw(
        st.sampled_from([content[:place], content + b"\0", content[:place] + flipped + content[place + 1 :]])
    )
    (folder / "damaged").write_bytes(damaged)
    with pytest.raises(MuonlabError, match=r"is torn: its content|holds no packed tokens") as caught:
        build_data("tokens", path=folder / "damaged")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"vocab_size": 3}, "its header describes other tokens"),
        ({"train_tokens": 5}, "its header describes other tokens"),
        ({"val_tokens": 0}, "val_tokens must be"),
        ({"begin": 3}, "begin"),
        ({"text": 1 << 40}, "its header describes other tokens|buffer size"),
    ],
)
def test_a_file_of_another_hand_is_refused(whole, header, message):
    import hashlib

    folder, content = whole
    end = content.index(b"\n", _START) + 1
    changed = json.dumps({**json.loads(content[_START:end]), **header}).encode() + b"\n"
    changed += b"\n" * (-(_START + len(changed)) % 64)
    changed += content[-(-end // 64) * 64 :]
    (folder / "other").write_bytes(FORM + hashlib.sha256(changed).hexdigest().encode() + b"\n" + changed)
    with pytest.raises(
        MuonlabError, match=f"other was not made by python -m muonlab.data pack: .*({message})"
    ):
        build_data("tokens", path=folder / "other")


def test_a_mistake_is_one_sentence(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("To be")
    for path, message in (
        (tmp_path / "nowhere", "there is no file .*nowhere; python -m muonlab.data pack"),
        (tmp_path, "there is no file"),
        (tmp_path / "empty", "empty holds no packed tokens"),
        (tmp_path / "text", "text holds no packed tokens; .* data=text reads any text"),
        (None, "needs a file of packed tokens"),
    ):
        with pytest.raises(MuonlabError, match=message):
            build_data("tokens", path=path)
    for arguments in (["pack"], ["pack", "shakespeare"], ["pack", "tokenizer=bpe"]):
        with pytest.raises(MuonlabError, match="pack needs the file to write"):
            main(arguments)
    with pytest.raises(MuonlabError, match="No such file or directory"):
        main(
            [
                "pack",
                str(tmp_path / "no" / "file"),
                "synthetic",
                "train_tokens=9",
                "val_tokens=9",
                f"cache={tmp_path}",
            ]
        )


def test_the_command_packs_any_corpus(tmp_path, capsys):
    path = tmp_path / "chain.tokens"
    main(["pack", str(path), "synthetic", "train_tokens=50", "val_tokens=20", f"cache={tmp_path / 'cache'}"])
    assert f"packed           {path.stat().st_size} bytes in {path}" in capsys.readouterr().out
    main(["tokens", f"path={path}"])
    assert "train_tokens     50\n" in capsys.readouterr().out
