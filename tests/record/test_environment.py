import json
import subprocess
import sys

from muonlab.record import collect_environment
from muonlab.record import environment as module


def test_it_says_what_a_repetition_needs():
    seen = collect_environment()
    assert seen.packages["torch"]
    assert seen.python == ".".join(map(str, sys.version_info[:3]))
    assert seen.command.startswith(sys.orig_argv[0])
    assert seen.cores >= 1
    assert seen.memory_gib > 0


def git(folder, *arguments):
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        check=True,
        capture_output=True,
    )


def test_the_commit_is_that_of_the_code_and_dirty_means_the_code(tmp_path, monkeypatch):
    package = tmp_path / "muonlab" / "record"
    package.mkdir(parents=True)
    (tmp_path / "muonlab" / "errors.py").write_text("")
    monkeypatch.setattr(module, "__file__", str(package / "environment.py"))
    read = module.code_version.__wrapped__  # past the cache of one process
    assert read() == (None, None)

    # Installed into somebody else's repository, which does not track it: not our commit.
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "theirs")
    assert read() == (None, None)

    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "ours")
    clean = read()
    assert len(clean[0]) == 40
    assert clean[1] is False
    (tmp_path / "results.csv").write_text("a result is not code")
    assert read() == clean
    for folder in ("muonlab/record", "conf/optimizer", "analysis", "experiments"):
        changed = tmp_path / folder / "changed"
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_text("")
        assert read() == (clean[0], True), folder
        changed.unlink()
    assert read() == clean


def test_it_comes_back_from_its_plain_values_and_from_those_of_other_versions():
    seen = collect_environment()
    assert module.Environment.read(json.loads(json.dumps(seen.values()))) == seen
    old = module.Environment.read({"host": "here", "a_word_of_tomorrow": 1})
    assert (old.host, old.commit, old.packages) == ("here", None, {})
