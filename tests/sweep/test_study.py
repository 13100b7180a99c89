"""A study runs exactly its trials, whoever is killed."""

import os
import socket

import optuna
import pytest
from optuna.trial import TrialState

from muonlab.errors import MuonlabError
from muonlab.sweep.study import DIVERGED_LOSS, open_storage, open_study

SPACE = {"lr": "tag(log, interval(1e-3, 1.0))", "weight_decay": "interval(0.0, 1.0)"}
PUBLISHED = {"lr": 0.02, "weight_decay": 0.1}


@pytest.fixture
def storage(tmp_path):
    return open_storage(None, tmp_path)


def opened(storage, sampler="quasi_random", trials=4):
    study = open_study(storage, "s", "muon", SPACE, sampler, seed=0)
    study.fill(trials, PUBLISHED, sampler, seed=0)
    return study


def settings_of(study):
    taken = []
    while trial := study.take():
        taken.append(trial.params)
        study.study.tell(trial, 1.0)
    return taken


@pytest.mark.parametrize("sampler", ["quasi_random", "tpe", "random"])
def test_the_published_setting_comes_first_and_the_total_is_kept(storage, sampler):
    taken = settings_of(opened(storage, sampler))
    assert taken[0] == PUBLISHED
    assert len(taken) == 4
    assert len({tuple(t.values()) for t in taken}) == 4
    assert opened(storage, sampler).take() is None


def test_asking_for_more_goes_on_and_for_fewer_is_refused(storage):
    first = settings_of(opened(storage))
    more = settings_of(opened(storage, trials=6))
    assert len(more) == 2
    assert not any(setting in first for setting in more)
    with pytest.raises(MuonlabError, match="already has 6 trials"):
        opened(storage, trials=5)


def test_two_workers_never_run_more_than_the_total(storage):
    one, other = opened(storage, trials=3), opened(storage, trials=3)
    trials = [one.take(), other.take(), one.take(), other.take(), one.take()]
    assert [trial is not None for trial in trials] == [True, True, True, False, False]
    assert len({trial.number for trial in trials[:3]}) == 3


def test_a_race_for_the_last_trial_makes_no_extra_one(storage, monkeypatch):
    study, rival = opened(storage, trials=1), opened(storage, trials=1)
    waiting = study.study.get_trials(states=(TrialState.WAITING,))
    assert rival.take() is not None
    with monkeypatch.context() as patch:  # what was read just before the rival took it
        patch.setattr(type(study.study), "get_trials", lambda *_, **__: waiting)
        assert study.take() is None
    assert study.counted() == []


def test_a_put_back_trial_is_taken_again_with_the_same_settings(storage):
    study = opened(storage, trials=1)
    trial = study.take()
    study.put_back(trial)
    assert study.counted() == []
    again = study.take()
    assert again.params == trial.params
    assert again.user_attrs["attempt"] == 2
    study.study.tell(again, 0.5)
    assert [t.number for t in study.counted()] == [again.number]
    assert opened(storage, trials=1).take() is None


def test_trials_of_dead_workers_of_this_machine_are_put_back(storage):
    study = opened(storage, trials=3)
    dead, living, elsewhere = study.take(), study.take(), study.take()
    dead.set_user_attr("owner", f"{socket.gethostname()}:{2**22 + 1}")
    elsewhere.set_user_attr("owner", f"another-host:{os.getpid()}")
    assert study.adopt_orphans() == 1
    assert study.take().params == dead.params
    assert study.take() is None
    states = {t.number: t.state for t in study.study.get_trials()}
    assert states[living.number] == states[elsewhere.number] == TrialState.RUNNING


def test_the_best_is_the_lowest_loss_that_did_not_diverge(storage):
    study = opened(storage)
    for value in (DIVERGED_LOSS, 2.0, 1.5, 1.5):
        study.study.tell(study.take(), value)
    assert study.best().number == 2
    assert len(study.counted()) == 4


def test_an_unknown_sampler_is_told(storage):
    with pytest.raises(MuonlabError, match="did you mean 'tpe'"):
        open_study(storage, "s", "muon", SPACE, "tpee", seed=0)


def test_any_optuna_storage_will_do(tmp_path):
    optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/o.db")
    study = opened(open_storage(f"sqlite:///{tmp_path}/o.db", tmp_path), trials=2)
    assert len(settings_of(study)) == 2
