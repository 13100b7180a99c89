"""A study runs exactly its slots, whoever opens it, takes them, dies, and when."""

import multiprocessing
import socket
from dataclasses import replace

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import Trial, TrialState
from tiny_designs import PUBLISHED, search

from muonlab.record.owner import Owner, machine
from muonlab.study.queue import Queue
from muonlab.study.space import suggest
from muonlab.study.storage import open_storage

SAMPLERS = ["quasi_random", "tpe", "random"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may handle it."""


@pytest.fixture
def opened(study, tmp_path):
    """opened(sampler, trials) -> (queue, slots), as a process has them that opens the study."""

    def open_it(sampler="quasi_random", trials=4, storage=None):
        made = study({"search": {"search": search(sampler, trials), "seeds": [0]}})
        made.save()
        return Queue(open_storage(storage, made.folder), made.name, made.design), made.slots()

    return open_it


@pytest.fixture
def dies(monkeypatch):
    """dies() makes the owner of every attempt so far a process that is gone, and this one another."""
    gone = Owner(socket.gethostname(), 2**22 + 1, 1, machine())

    def die():
        monkeypatch.setattr(Owner, "alive", property(lambda owner: owner != gone))
        monkeypatch.setattr(Owner, "this", classmethod(lambda cls: Owner("here", 1, 1)))

    monkeypatch.setattr(Owner, "alive", property(lambda owner: True))
    monkeypatch.setattr(Owner, "this", classmethod(lambda cls: gone))
    return die


def settings_of(queue, slots):
    taken = []
    for slot in slots:
        if claim := queue.claim(slot):
            taken.append(claim.slot.level.setting)
            queue.finish(claim, "finished", "", 1.0)
    return taken


def test_slots_have_names_of_their_own(opened):
    _, slots = opened(trials=3)
    assert [slot.name for slot in slots] == [
        "search/muon/published/s0",
        "search/muon/1/s0",
        "search/muon/2/s0",
    ]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_published_setting_comes_first_and_every_setting_is_another(opened, sampler):
    taken = settings_of(*opened(sampler))
    assert taken[0] == PUBLISHED
    assert len({tuple(setting.values()) for setting in taken}) == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_asking_for_more_adds_slots_and_leaves_the_others_alone(opened, sampler):
    queue, slots = opened(sampler)
    settings_of(queue, slots)
    before = [queue.drawn(slot).level.setting for slot in slots]
    queue, more = opened(sampler, trials=6)
    assert [queue.drawn(slot).level.setting for slot in more[:4]] == before
    assert [slot.name for slot in more[:4]] == [slot.name for slot in slots]
    assert len(settings_of(queue, more[4:])) == 2


def test_a_taken_slot_is_nobody_elses(opened):
    one, slots = opened()
    other, _ = opened()
    claim = one.claim(slots[0])
    assert other.busy(slots) == {slots[0].name}
    assert other.claim(slots[0]) is None
    one.finish(claim, "killed", "", None)
    assert not other.busy(slots)
    assert other.claim(slots[0]).slot == claim.slot


def hold(barrier, study, results):
    study.save()
    queue = Queue(open_storage(None, study.folder), study.name, study.design)
    slots = study.slots()
    barrier.wait()
    won = [slot.name for slot in slots if queue.claim(slot)]
    results.put(won)
    barrier.wait()  # alive until the other has tried them all


def test_two_processes_that_open_a_new_study_at_once_share_its_slots(study):
    made = study({"search": {"search": search(trials=8), "seeds": [0]}})
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=hold, args=(barrier, made, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    won = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(won[0] + won[1]) == sorted(slot.name for slot in made.slots())


def test_a_rival_between_looking_and_taking_withdraws_one_of_the_two(opened, monkeypatch):
    """Both saw the slot open; of the two attempts the lower number has it."""
    one, slots = opened()
    other, _ = opened()
    rivals = []
    whole = Queue._attempt

    def late(queue, optuna_study, slot):
        if queue is one and not rivals:
            rivals.append(other.claim(slot))
        return whole(queue, optuna_study, slot)

    monkeypatch.setattr(Queue, "_attempt", late)
    assert one.claim(slots[0]) is None
    assert rivals[0].slot.name == slots[0].name
    assert len(one.attempts(slots[:1])) == 1


GAPS = {
    "before the attempt is made": (Queue, "_attempt"),
    "between the attempt and its check": (Queue, "_drawn"),
    "while a sampler suggests": (Trial, "suggest_float"),
    "before the end is recorded": (optuna.Study, "tell"),
}


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("place", [0, 2])
def test_a_kill_in_any_gap_loses_no_slot_and_no_setting(opened, dies, monkeypatch, gap, sampler, place):
    """The next worker gets the slot; the published setting is tried whatever happened; nothing is doubled."""
    queue, slots = opened(sampler)
    settings_of(queue, slots[:place])
    owner, name = GAPS[gap]

    def kill(*_, **__):
        raise Killed

    died = True
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        try:
            claim = queue.claim(slots[place])
            queue.finish(claim, "finished", "", 1.0)
            died = False
        except Killed:
            pass
    assert died or (gap == "while a sampler suggests" and not slots[place].drawn)
    if not died:
        return
    dies()
    queue, slots = opened(sampler)
    assert not queue.busy([slots[place]])
    claim = queue.claim(slots[place])
    if place == 0:
        assert claim.slot.level.setting == PUBLISHED
    if sampler == "quasi_random":
        assert claim.slot == slots[place]
    assert claim.slot.level.setting.keys() == PUBLISHED.keys()
    queue.finish(claim, "finished", "", 1.0)
    settings_of(queue, slots[place + 1 :])
    complete = [attempt.slot for attempt in queue.attempts(slots) if attempt.state == "COMPLETE"]
    assert complete == [slot.name for slot in slots]


WRITES = ("create_new_study", "create_new_trial", "set_trial_param", "set_trial_user_attr")
WRITES += ("set_trial_state_values", "set_study_user_attr")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_kill_after_any_write_to_the_storage_leaves_the_slot_open_with_its_setting(
    opened, dies, monkeypatch, sampler, tmp_path
):
    """Every cut of a heartbeat, a claim and its end: the next worker gets the slot, with the setting that was drawn."""
    survived, whole = False, 0
    for cut in range(60):
        for journal in tmp_path.glob("studies/*/journal.log*"):
            journal.unlink()
        queue, slots = opened(sampler)
        count = 0

        def killing(write, cut=cut):
            def call(*arguments, **keywords):
                nonlocal count
                result = write(*arguments, **keywords)
                count += 1
                if count > cut:
                    raise Killed
                return result

            return call

        with monkeypatch.context() as patch:
            for name in WRITES:
                patch.setattr(JournalStorage, name, killing(getattr(JournalStorage, name)))
            try:
                queue.heartbeat.beat()
                claim = queue.claim(slots[1])
                queue.finish(claim, "killed", "", None)
                survived = True
            except Killed:
                pass
        with monkeypatch.context() as patch:
            patch.setattr(Owner, "alive", property(lambda owner: owner.host == "here"))
            patch.setattr(Owner, "this", classmethod(lambda cls: Owner("here", 1, 1)))
            queue, slots = opened(sampler)
            assert not queue.busy(slots), cut
            known = queue.drawn(slots[1])
            claim = queue.claim(slots[1])
            assert claim.slot.level.setting.keys() == PUBLISHED.keys()
            assert known is None or known == claim.slot, cut
            whole += known is not None
            queue.finish(claim, "killed", "", None)
        if survived:
            break
    assert survived
    assert 2 < whole < cut or sampler == "quasi_random", (
        "some cuts are before the setting is drawn, some after"
    )


def test_a_setting_that_was_drawn_whole_is_kept_by_the_next_attempt(opened, dies, monkeypatch):
    queue, slots = opened("random")
    first = queue.claim(slots[1]).slot
    dies()
    queue, slots = opened("random")
    assert queue.claim(slots[1]).slot == first


def test_a_kill_between_failed_and_again_leaves_the_slot_open(opened, monkeypatch):
    """There is nothing to put back: a failed attempt leaves its slot open by itself."""
    queue, slots = opened()
    queue.finish(queue.claim(slots[0]), "killed", "SIGKILL", None)
    queue, slots = opened()
    assert queue.claim(slots[0]).slot.level.setting == PUBLISHED


def test_a_process_that_has_the_number_of_a_dead_one_is_not_the_owner(opened, monkeypatch):
    queue, slots = opened()
    reused = replace(Owner.this(), pid_started=Owner.this().pid_started - 1)
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "this", classmethod(lambda cls: reused))
        queue.claim(slots[0])
    assert not opened()[0].busy(slots)
    assert opened()[0].claim(slots[0]) is not None


def test_the_owner_on_another_host_is_taken_to_live(opened, monkeypatch):
    queue, slots = opened()
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "this", classmethod(lambda cls: Owner("another-host", 1, 1)))
        queue.claim(slots[0])
    assert queue.busy(slots)
    assert queue.claim(slots[0]) is None


def test_attempts_of_dead_workers_are_ended_once(opened, dies, monkeypatch):
    queue, slots = opened()
    queue.claim(slots[0])
    assert [alive for _, alive in opened()[0].running(slots)] == [True]
    dies()
    queue, _ = opened()
    [(left, alive)] = queue.running(slots)
    assert (left.slot, alive) == (slots[0], False)
    queue.finish(left, "finished", "", 2.0)
    queue.finish(left, "killed", "", None)  # a second end changes nothing
    [attempt] = queue.attempts(slots)
    assert (attempt.state, attempt.value) == ("COMPLETE", 2.0)
    assert queue.running(slots) == []


def test_a_slot_is_counted_once_however_often_its_run_is_mended(opened):
    queue, slots = opened()
    assert queue.uncounted(slots) == slots
    for _ in range(2):
        queue.finish(queue.claim(slots[0]), "finished", "", 1.0)
    assert [(a.slot, a.state) for a in queue.attempts(slots)] == [(slots[0].name, "COMPLETE")]
    assert queue.uncounted(slots) == slots[1:]


def test_any_optuna_storage_will_do(opened, tmp_path):
    url = f"sqlite:///{tmp_path}/o.db"
    assert len(settings_of(*opened(trials=2, storage=url))) == 2


def test_suggest_draws_from_every_kind_of_space():
    from muonlab.study.space import parse_space

    space = parse_space({"a": "choice(1, 2)", "b": "range(1, 9)", "c": "tag(log, interval(0.1, 1.0))"})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    for name, distribution in space.items():
        suggest(trial, name, distribution)
    assert trial.params.keys() == space.keys()
    assert study.get_trials()[0].state == TrialState.RUNNING
