"""`python -m muonlab.data`: what it prints, and every mistake in one sentence."""

import os
import subprocess
import sys

import pytest

from muonlab.data.__main__ import main, read_settings
from muonlab.errors import MuonlabError


def run(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "muonlab.data", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=120, env=os.environ | environment
    )


def test_the_command_prints_what_is_ready(tmp_path, capsys):
    (tmp_path / "input.txt").write_bytes(b"Now is the winter of our discontent\n" * 10)
    main(["text", f"path={tmp_path / 'input.txt'}", "val_fraction=0.5", f"cache={tmp_path}"])
    printed = capsys.readouterr().out
    assert "train_tokens     180\n" in printed
    assert "train begins     'Now is the winter" in printed
    main(["synthetic", "order=1", "train_tokens=50", "val_tokens=50", f"cache={tmp_path}"])
    assert "entropy_rate     1." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("concentration=1e-1", 0.1),
        ("path=*.txt", "*.txt"),
        ("path=@home/x.txt", "@home/x.txt"),
        ("path='a=b, c.txt'", "a=b, c.txt"),
        ("path=null", None),
        ("path=", ""),
        ("path=007.txt", "007.txt"),
        ("bpe_vocab_size=abc", "abc"),
        ("bpe_vocab_size=300", 300),
        ("path=no", "no"),
    ],
)
def test_values_are_read_by_hydras_grammar(text, value):
    assert list(read_settings([text]).values()) == [value]


def test_environment_variables_are_put_in(monkeypatch):
    monkeypatch.setenv("TEXTS", "/somewhere")
    assert read_settings(["path=${oc.env:TEXTS}/a.txt"]) == {"path": "/somewhere/a.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shakespear"], "unknown data 'shakespear'; did you mean 'shakespeare'"),
        (["text", "path=/nowhere/at/all"], "there is no file or folder /nowhere/at/all"),
        (["text", "path=*.txt"], r"there is no file or folder \*\.txt"),
        (["text", "path=@home/x.txt"], "there is no file or folder @home/x.txt"),
        (["text", "path='~nobody-here/x.txt'"], "there is no home folder for ~nobody-here"),
        (["text", f"path={__file__}", f"cache=/{'x' * 300}"], "cannot write to the data cache /x*"),
        (["text", f"path={'x' * 300}"], "cannot read x*: File name too long"),
        (["text", "path=3"], r"data.path must be text or null, not 3"),
        (["text", "path="], "needs a text file or a folder"),
        (["text", "path=???"], "Missing mandatory value"),
        (["text", "path=${nowhere}"], "Interpolation key 'nowhere' not found"),
        (["text", "path=${"], "."),
        (["text", "path"], "path"),
        (["text", "path=a.txt,b.txt"], "settings are written name=value, not 'path=a.txt,b.txt'"),
        (["text", "+path=a.txt"], r"settings are written name=value, not '\+path=a.txt'"),
        (["text", "~path"], "settings are written name=value, not '~path'"),
        (["text", "path=a=b"], "."),
        (["text", "name=english"], r"unknown data.name 'english'"),
        (["text", "path=[a, b]"], r"data.path must be text or null, not \['a', 'b'\]"),
        (["text", "path={a: b}"], "data.path must be text or null, not"),
        (
            ["shakespeare", "tokenizer=bpe", "bpe_vocab_size=abc"],
            r"data.bpe_vocab_size must be .*, not 'abc'",
        ),
        (["shakespeare", "cache=3"], "cache must be text or null, not 3"),
        (["synthetic", "order=3"], r"more than 1024 states"),
        (["synthetic", "concentration=nan"], r"data.concentration must be .*, not nan"),
        (["--color"], "unrecognized arguments: --color"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message):
    with pytest.raises(MuonlabError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_a_mistake_is_exit_code_2_and_nothing_is_left_behind(tmp_path):
    done = run("text", "path=*.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "muonlab: there is no file or folder *.txt\n"
    assert list(tmp_path.iterdir()) == []


def test_letters_that_the_terminal_lacks_and_a_closed_pipe_are_no_mistakes(tmp_path):
    (tmp_path / "input.txt").write_text("Dès qu'il parle à l'oreille, écoute… " * 100, encoding="utf-8")
    done = run("text", "path=input.txt", "cache=cache", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "tokenizing text\n")
    assert 'train begins     "D?s qu' in done.stdout
    command = f"{sys.executable} -m muonlab.data text path=input.txt cache=cache | true"
    piped = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (piped.returncode, piped.stderr) == (141, "")  # as of other programs whose reader has left
