"""The journal of a study's queue has whole lines only, whatever cut the last one."""

import json
import multiprocessing
import os
import subprocess

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.study import journal as module
from muonlab.study.journal import Journal, cut_torn_line, set_damaged_lines_aside


def opened(path):
    """A new reader and writer of the study in the journal, as another process has it."""
    return optuna.load_study(study_name="s", storage=JournalStorage(Journal(str(path))))


def begun(path):
    """The same of a new journal."""
    return optuna.create_study(study_name="s", storage=JournalStorage(Journal(str(path))))


@pytest.fixture
def journal(tmp_path):
    """A journal with one finished trial, and the length of each of its lines."""
    path = tmp_path / "journal.log"
    study = begun(path)
    study.tell(study.ask(), 1.0)
    return path, [len(line) + 1 for line in path.read_bytes().splitlines()]


def test_an_append_after_any_cut_of_the_last_line_is_read_by_all(journal):
    path, lengths = journal
    whole = path.read_bytes()
    for cut in range(1, lengths[-1] + 1):
        path.write_bytes(whole[:-cut])
        torn = path.with_suffix(".torn")
        torn.unlink(missing_ok=True)
        reader = opened(path)  # also an older reader, which has seen the half line, goes on
        assert [trial.state for trial in reader.trials] == [TrialState.RUNNING]
        writer = opened(path)
        writer.tell(0, 2.0)
        assert [trial.value for trial in reader.get_trials()] == [2.0]
        assert [trial.value for trial in opened(path).trials] == [2.0]
        kept = torn.read_bytes() if torn.exists() else b""
        assert kept == (whole[-lengths[-1] : -cut] + b"\n" if cut < lengths[-1] else b"")


def test_whole_lines_are_left_alone(journal):
    path, _ = journal
    before = path.read_bytes()
    assert cut_torn_line(path) == b""
    assert set_damaged_lines_aside(path) == []
    assert path.read_bytes() == before
    assert not path.with_suffix(".torn").exists()


def test_a_long_torn_line_is_cut_at_its_beginning(journal):
    path, _ = journal
    before = path.read_bytes()
    path.write_bytes(before + b"x" * 10_000)
    assert cut_torn_line(path) == b"x" * 10_000
    assert path.read_bytes() == before
    path.write_bytes(b"no line at all")
    cut_torn_line(path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("half", [b'{"op_code":5,"work', b"\0\0\0\0", b"\xff\xfe\n", b"[1\n"])
def test_a_line_that_an_older_version_appended_to_a_half_one_is_reported_and_repaired(journal, half):
    """Optuna's own backend appended to a half line: an operation was lost, and nobody could read the journal."""
    path, lengths = journal
    whole = path.read_bytes()
    path.write_bytes(whole[: lengths[0]] + half + whole[lengths[0] :])
    with pytest.raises(MuonlabError, match=r"has a damaged line.*muonlab\.study\.repair") as caught:
        opened(path)
    assert "\n" not in str(caught.value)
    [aside] = set_damaged_lines_aside(path)
    assert aside.startswith(half.rstrip(b"\n"))
    assert path.with_suffix(".torn").read_bytes() == aside + b"\n"
    assert path.read_bytes() == whole
    assert opened(path).trials[0].value == 1.0
    assert set_damaged_lines_aside(path) == []


def test_a_full_disk_leaves_whole_lines_and_is_an_environment_fault(journal, monkeypatch):
    path, _ = journal
    study, write = opened(path), os.write
    before = path.read_bytes()

    def half(descriptor, data):
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as full:
        full.setattr(module.os, "write", half)
        with pytest.raises(EnvironmentFault, match=r"cannot write .*journal.log: No space left on device"):
            study.ask()
    assert path.read_bytes() == before
    assert study.ask().number == opened(path).trials[-1].number == 1


def test_a_full_file_system_costs_no_operation(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        path = folder / "journal.log"
        study = begun(path)
        with pytest.raises(EnvironmentFault, match="No space left"):
            ask_many(path, 200)
        done = len(opened(path).trials)
        assert 0 < done < 200
        lines = path.read_bytes().splitlines(keepends=True)
        assert all(line.endswith(b"\n") and json.loads(line) for line in lines)
        subprocess.run(["mount", "-o", "remount,size=64k", folder], check=True)
        study.ask()
        assert len(opened(path).trials) == done + 1
    finally:
        subprocess.run(["umount", folder], check=True)


def ask_many(path, count):
    study = opened(path)
    for _ in range(count):
        study.ask()


def test_a_writer_that_is_killed_at_any_moment_holds_nobody_up(tmp_path):
    """Its lock ends with it; a lock file of Optuna's is waited for half a minute."""
    path = tmp_path / "journal.log"
    begun(path)
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        writer = context.Process(target=ask_many, args=(path, 10_000))
        writer.start()
        asked = len(opened(path).trials)
        while len(opened(path).trials) < asked + 3:
            pass
        writer.kill()
        writer.join()
        study = opened(path)
        study.tell(study.ask(), 2.0)
    trials = opened(path).trials
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert sum(trial.value == 2.0 for trial in trials) == 5
