"""Which run a run is: its text, what counts for its identity, and who may write it."""

import pytest
from tiny_runs import TINY

from muonlab.cli import compose_config, plain
from muonlab.errors import MuonlabError
from muonlab.record import RunRecord, load_run, run_identity
from muonlab.train.config import read_config
from muonlab.train.run import run_folder, train, with_corpus

WALL_CLOCK = ["seconds"]


@pytest.fixture
def on_text(tmp_path):
    """on_text(*overrides) -> the settings of a tiny run on the file text.txt of tmp_path."""

    def compose(*overrides):
        corpus = ["data=text", f"data.path={tmp_path / 'text.txt'}"]
        rest = [o for o in TINY if not o.startswith("data")]
        paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
        return read_config(plain(compose_config("train", [*corpus, *rest, *paths, *overrides])))

    return compose


def test_a_run_on_another_text_is_another_run(on_text, tmp_path):
    """A replaced file neither passes for the finished run nor is it read on into by an interrupted one."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 500)
    first = train(on_text())
    assert train(on_text()).trained is False
    text.write_text("that is the question " * 500)
    second = train(on_text())
    assert (second.trained, second.status) == (True, "finished")
    assert second.folder != first.folder
    configs = [load_run(outcome.folder).config for outcome in (first, second)]
    assert configs[0]["corpus"] != configs[1]["corpus"]
    assert len(configs[0]["corpus"]) == 16


def test_a_text_that_changes_while_its_run_waits_is_refused(on_text, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 500)
    waiting = with_corpus(on_text())
    text.write_text("that is the question " * 500)
    with pytest.raises(MuonlabError, match="changed while its runs were waiting"):
        train(waiting)


def test_what_is_off_does_not_count_for_the_identity(tiny):
    """A setting that a later version adds, off by default, leaves the identity of every run alone."""
    config = with_corpus(tiny())
    values = config.as_dict()
    values["optimizer"] |= {"a_new_switch": False, "a_new_number": None}
    assert run_identity(values) == config.identity
    values["optimizer"]["a_new_switch"] = True
    assert run_identity(values) != config.identity


def test_a_run_that_another_process_writes_is_not_moved_away_by_force(tiny, tmp_path):
    config = with_corpus(tiny("force=true"))
    folder = run_folder(config)
    record = RunRecord.create(folder, config.as_dict(), [])
    (folder / "status.json").write_text("{")  # the lease alone says who writes
    with pytest.raises(MuonlabError, match="is being written by process"):
        train(config)
    assert (folder / "config.yaml").exists()
    record.close()
    assert train(config).status == "finished"
    assert len(list((folder.parent / ".replaced").iterdir())) == 1
