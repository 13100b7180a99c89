"""Heartbeats in the storage alone decide who is alive, and the slot of a silent worker is taken over."""

import pytest
from optuna.storages import JournalStorage
from tiny_designs import PUBLISHED, search

from muonlab.errors import EnvironmentFault
from muonlab.record.owner import Owner
from muonlab.study.heartbeat import Heartbeat
from muonlab.study.queue import SILENT, Queue
from muonlab.study.storage import open_storage


@pytest.fixture
def opened(study, monkeypatch):
    """opened(sampler) -> (queue, slots), as a process on a machine of its own has them."""
    monkeypatch.setattr(Owner, "alive", property(lambda owner: None))

    def open_it(sampler="quasi_random"):
        made = study({"search": {"search": search(sampler, 3), "seeds": [0]}})
        made.save()
        return Queue(open_storage(None, made.folder), made.name, made.design), made.slots()

    return open_it


def beats(queue, count):
    for _ in range(count):
        queue.heartbeat.beat()


def test_a_worker_is_silent_after_three_beats_of_the_observer(opened):
    (theirs, _), (ours, _) = opened(), opened()
    beats(theirs, 1)
    beats(ours, 1)
    token = theirs.heartbeat.token
    beats(ours, 2)
    assert ours.heartbeat.alive(token)
    beats(ours, 2)
    assert not ours.heartbeat.alive(token)
    beats(theirs, 1)
    beats(ours, 1)
    assert ours.heartbeat.alive(token), "it came back"


def test_a_worker_that_beats_more_slowly_is_given_its_own_time(opened):
    (theirs, _), (ours, _) = opened(), opened()
    theirs.heartbeat.every = 3 * ours.heartbeat.every
    beats(theirs, 1)
    beats(ours, 9)
    assert ours.heartbeat.alive(theirs.heartbeat.token)
    beats(ours, 2)
    assert not ours.heartbeat.alive(theirs.heartbeat.token)


def test_a_storage_that_nobody_can_write_silences_nobody(opened, monkeypatch):
    (theirs, slots), (ours, _) = opened(), opened()
    beats(theirs, 1)
    beats(ours, 1)
    claim = theirs.claim(slots[0])
    with monkeypatch.context() as patch:

        def locked(*_):
            raise OSError("database is locked")

        patch.setattr(JournalStorage, "set_study_user_attr", locked)
        for _ in range(10):
            with pytest.raises(OSError, match="locked"):
                ours.heartbeat.beat()
    assert ours.busy(slots) == {claim.slot.name}
    assert ours.claim(slots[0]) is None


def test_the_thread_keeps_beating_through_faults(opened, monkeypatch):
    monkeypatch.setenv("MUONLAB_BEAT", "0.01")
    ours, _ = opened()
    other, _ = opened()
    faults = []

    def locked(*_):
        faults.append(1)
        raise OSError("database is locked")

    with ours.heartbeat, monkeypatch.context() as patch:
        patch.setattr(Heartbeat, "beat", locked)
        while len(faults) < 3:
            pass
        patch.undo()
        while ours.heartbeat._beats < 2:
            pass
    beats(other, 1)
    assert ours.heartbeat.token in other.heartbeat._signs


@pytest.mark.parametrize("sampler", ["quasi_random", "tpe"])
def test_the_slot_of_a_silent_worker_is_taken_with_its_setting_and_its_late_end_is_ignored(opened, sampler):
    (theirs, slots), (ours, _) = opened(sampler), opened(sampler)
    beats(theirs, 1)
    beats(ours, 1)
    lost = theirs.claim(slots[1])
    assert ours.claim(slots[1]) is None
    beats(ours, 4)
    claim = ours.claim(slots[1])
    assert claim.slot == lost.slot
    theirs.finish(lost, "finished", "", 1.0)
    ours.finish(claim, "finished", "", 2.0)
    first, second = ours.attempts(slots)
    assert (first.state, first.status, first.cause) == ("FAIL", "killed", SILENT)
    assert (second.state, second.value) == ("COMPLETE", 2.0)


def test_a_worker_that_was_silent_in_the_middle_of_a_claim_does_not_have_the_slot(opened, monkeypatch):
    (theirs, slots), (ours, _) = opened("tpe"), opened("tpe")
    beats(theirs, 1)
    beats(ours, 1)
    whole, taken = Queue._drawn, []

    def stopped(queue, optuna_study, slot, mine):
        if queue is theirs:
            beats(ours, 4)
            taken.append(ours.claim(slot))
        return whole(queue, optuna_study, slot, mine)

    monkeypatch.setattr(Queue, "_drawn", stopped)
    assert theirs.claim(slots[1]) is None
    assert taken[0].slot.level.setting.keys() == PUBLISHED.keys()


def test_a_claim_that_the_storage_cut_short_is_nobodys(opened, monkeypatch):
    ours, slots = opened("tpe")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(JournalStorage, "set_trial_param", full)
        with pytest.raises(EnvironmentFault, match="No space left"):
            ours.claim(slots[1])
    assert not ours.busy(slots)
    assert ours.claim(slots[1]).slot.level.setting.keys() == PUBLISHED.keys()
