"""The Optuna studies of a sweep: one an optimizer, in one storage, with exactly the trials that fairness allows.

All trials of a study are enqueued when it is made: the published setting first, then either fixed quasi-random
settings or empty slots that an adaptive sampler fills. A worker only ever takes a waiting trial, so any number of
workers on any number of machines together run exactly the total, and the same command goes on where it was stopped.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from muonlab.errors import MuonlabError, unknown_name
from muonlab.sweep.space import parse_space, quasi_random

# A diverged run's objective: finite, because Optuna drops NaN and infinity, and worse than any loss in nats.
DIVERGED_LOSS = 100.0
SAMPLERS = ("quasi_random", "tpe", "random", "cmaes", "gp")

optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_storage(url: str | None, folder: Path) -> BaseStorage | str:
    """Any Optuna storage by URL; None: a journal file in the study's folder, which several processes may share."""
    if url:
        return url
    path = str(folder / "journal.log")
    return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))


@dataclass
class OptimizerStudy:
    """The search of one optimizer: its Optuna study, its space and its number of trials."""

    optimizer: str
    study: optuna.Study
    space: dict[str, BaseDistribution]

    def fill(self, total: int, published: dict[str, Any], sampler: str, seed: int) -> None:
        """Enqueue trials until there are `total`: the published setting first, then the sampler's.

        Raises MuonlabError where the study already has more.
        """
        slots = [t for t in self.study.get_trials(deepcopy=False) if "repeats" not in t.user_attrs]
        have = len([t for t in slots if "role" in t.user_attrs])
        if have > total:
            raise MuonlabError(
                f"search.trials={total}, but this study already has {have} trials of {self.optimizer}; "
                "ask for at least as many, or name another study"
            )
        drawn = quasi_random(self.space, total - 1, seed) if sampler == "quasi_random" else [{}] * (total - 1)
        settings = [(published, "published")] + [(params, sampler) for params in drawn]
        for params, role in settings[have:total]:
            self.study.enqueue_trial(params, user_attrs={"role": role, "attempt": 1})

    def take(self) -> optuna.Trial | None:
        """A waiting trial with its settings suggested, or None where all are taken."""
        if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return None
        trial = self.study.ask()
        if "role" not in trial.user_attrs:
            # Another worker took the last waiting trial in between, and Optuna made a new one.
            trial.set_user_attr("surplus", True)
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        trial.set_user_attr("owner", f"{socket.gethostname()}:{os.getpid()}")
        for name, distribution in self.space.items():
            _suggest(trial, name, distribution)
        return trial

    def put_back(self, trial: optuna.Trial | FrozenTrial) -> None:
        """An interrupted or killed trial is recorded as failed, and its settings wait again as one more attempt."""
        self.study.tell(trial.number, state=TrialState.FAIL)
        about = {
            "role": trial.user_attrs["role"],
            "attempt": trial.user_attrs["attempt"] + 1,
            "repeats": trial.number,
        }
        self.study.enqueue_trial(trial.params, user_attrs=about)

    def adopt_orphans(self) -> int:
        """Put back the trials of this machine's workers that are gone; how many there were.

        Optuna leaves the trial of a killed worker running for ever. Workers on other machines cannot be looked at and
        are left alone.
        """
        orphans = 0
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            host, _, pid = trial.user_attrs.get("owner", ":0").rpartition(":")
            if host in ("", socket.gethostname()) and not _alive(int(pid)):
                self.put_back(trial)
                orphans += 1
        return orphans

    def counted(self) -> list[FrozenTrial]:
        """The trials that ended for good: completed (a diverged one too) or failed, and not repeated by another."""
        trials = self.study.get_trials(deepcopy=False)
        repeated = {t.user_attrs.get("repeats") for t in trials}
        ended = (TrialState.COMPLETE, TrialState.FAIL)
        return [
            t
            for t in trials
            if t.state in ended and t.number not in repeated and "surplus" not in t.user_attrs
        ]

    def best(self) -> FrozenTrial | None:
        """The trial with the lowest validation loss, the earliest of equals; None while none has finished."""
        finished = [t for t in self.counted() if t.state == TrialState.COMPLETE and t.value < DIVERGED_LOSS]
        return min(finished, key=lambda t: (t.value, t.number), default=None)


def open_study(
    storage: BaseStorage | str, name: str, optimizer: str, space: dict[str, str], sampler: str, seed: int
) -> OptimizerStudy:
    """The Optuna study `<name>/<optimizer>`, made if there is none.

    `sampler` is one of SAMPLERS; `seed` makes it reproducible where trials end in the same order (quasi_random:
    always). Raises MuonlabError for an unknown sampler or a space that cannot be read.
    """
    if sampler not in SAMPLERS:
        raise unknown_name("search.sampler", sampler, SAMPLERS)
    makers = {
        "quasi_random": optuna.samplers.RandomSampler,
        "tpe": optuna.samplers.TPESampler,
        "random": optuna.samplers.RandomSampler,
        "cmaes": optuna.samplers.CmaEsSampler,
        "gp": optuna.samplers.GPSampler,
    }
    study = optuna.create_study(
        study_name=f"{name}/{optimizer}",
        storage=storage,
        sampler=makers[sampler](seed=seed),
        direction="minimize",
        load_if_exists=True,
    )
    return OptimizerStudy(optimizer, study, parse_space(space))


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    suggest = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    step = {} if distribution.log else {"step": distribution.step}
    return suggest(name, distribution.low, distribution.high, log=distribution.log, **step)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0
