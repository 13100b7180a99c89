import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from muonlab.data import DATA, Corpus, build_data, corpus_digest, list_data, make_data, open_corpus
from muonlab.errors import MuonlabError
from muonlab.settings.check import build
from muonlab.settings.data import DATA_SETTINGS, TextSettings

CONF = Path(__file__).parents[2] / "conf" / "data"


def test_every_corpus_has_a_config_with_its_settings_and_defaults():
    assert list_data() == sorted(path.stem for path in CONF.glob("*.yaml")) == sorted(DATA_SETTINGS)
    for name in list_data():
        config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        assert config.pop("name") == name
        assert config == DATA.settings(name)
        assert DATA.section(name) is DATA_SETTINGS[name]


def test_misspelt_names_and_settings_name_the_near_ones(tmp_path):
    with pytest.raises(MuonlabError, match="unknown data 'shakspeare'; did you mean 'shakespeare'"):
        build_data("shakspeare")
    with pytest.raises(MuonlabError, match="unknown data setting 'pth'; did you mean 'path'"):
        build_data("text", pth=tmp_path)
    with pytest.raises(MuonlabError, match=r"unknown data.tokenizer 'byt'; did you mean 'byte'"):
        build_data("text", path=tmp_path, tokenizer="byt")


@pytest.mark.parametrize("size", [256, 65537, 300.0, "abc", True])
def test_a_vocabulary_out_of_range_is_refused(size, tmp_path):
    with pytest.raises(
        MuonlabError, match=r"data.bpe_vocab_size must be .* at least 257 and at most 65,536, not"
    ):
        build_data("text", path=tmp_path, tokenizer="bpe", bpe_vocab_size=size)


def section(path, **values):
    return build(TextSettings, {"path": str(path), **values}, "data")


def test_the_digest_is_of_the_text_and_known_without_its_tokens(tmp_path):
    path, copy, cache = tmp_path / "input.txt", tmp_path / "copy.txt", tmp_path / "cache"
    for file in (path, copy):
        file.write_bytes(b"to be or not to be")
    digest = corpus_digest(section(path), cache)
    assert len(digest) == 16
    assert int(digest, 16) >= 0
    assert not cache.exists()
    assert corpus_digest(section(copy, tokenizer="bpe"), cache) == digest
    assert corpus_digest(section(path, val_fraction=0.5), cache) != digest
    path.write_bytes(b"to be or not to BE")
    assert corpus_digest(section(path), cache) != digest


def test_every_corpus_without_files_has_its_digest_at_once(tmp_path):
    digests = {}
    for name in ("shakespeare", "english", "synthetic"):
        settings = build(DATA.section(name), {}, "data")
        digests[name] = corpus_digest(settings, tmp_path)
        assert corpus_digest(settings, tmp_path) == digests[name]
    assert len(set(digests.values())) == 3
    assert all(len(digest) == 16 for digest in digests.values())
    assert list(tmp_path.iterdir()) == []
    longer = build(DATA.section("synthetic"), {"train_tokens": 999}, "data")
    assert corpus_digest(longer, tmp_path) != digests["synthetic"]


def test_a_short_digest_is_sixteen_hex_digits_of_any_digest():
    def digest(text):
        return Corpus("made", "here", text, train=list, val=list).short_digest

    assert digest("0123456789abcdef" * 4) == "0123456789abcdef"
    assert digest('["a", 1]') != digest('["a", 2]')
    assert len(digest("abc")) == 16


def test_an_open_corpus_is_passed_on_so_that_no_text_is_read_twice(tmp_path, monkeypatch):
    path = tmp_path / "input.txt"
    path.write_bytes(b"to be or not to be")
    corpus = open_corpus(section(path))
    monkeypatch.setattr("muonlab.data.text._content_digest", lambda *_: pytest.fail("read again"))
    data = make_data(section(path), tmp_path / "cache", corpus)
    assert data.train.tobytes() + data.val.tobytes() == path.read_bytes()
    with pytest.raises(pytest.fail.Exception, match="read again"):
        make_data(section(path), tmp_path / "cache")


def test_a_corpus_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(DATA, "_builders", dict(DATA._builders))
    monkeypatch.setattr(DATA, "_sections", dict(DATA._sections))

    @DATA.register("mine")
    def mine(cache, *, word: str = "ho"):
        return Corpus(
            "mine", "made here", word, train=lambda: [word.encode() * 9], val=lambda: [word.encode()]
        )

    data = build_data("mine", tmp_path, word="hey")
    assert (data.train.tobytes(), data.val.tobytes()) == (b"hey" * 9, b"hey")
    with pytest.raises(MuonlabError, match=r"data.word must be text, not 3"):
        build_data("mine", tmp_path, word=3)


def test_importing_the_package_is_light():
    heavy = {"torch", "tokenizers", "datasets", "pandas", "lightning", "mlflow", "hydra"}
    code = (
        "import sys; from muonlab.data import DATA, corpus_digest, make_data;"
        "from muonlab.settings.check import build;"
        "corpus_digest(build(DATA.section('shakespeare'), {}, 'data'));"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
