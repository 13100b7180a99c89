"""The queue of a study: who has which slot, in an Optuna storage that any number of workers share.

Slots count, not trials. The slots follow from the design and nothing is enqueued, so opening a study twice, or in two
processes at once, changes nothing. A trial is an *attempt* at a slot. One transaction creates it as running, with the
slot's name, its owner and its setting, and its number decides: among the living attempts at a slot the lowest has it,
and every other withdraws. A worker that finds the owner of an attempt dead ends the attempt in the storage, so that all
see one decision, including an owner that was merely cut off. A slot without a living attempt is open again, and keeps
the setting of its first attempt.
"""

import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from muonlab.record.owner import Owner
from muonlab.settings.search import SearchSettings
from muonlab.study.design import Design, searches
from muonlab.study.heartbeat import Heartbeat
from muonlab.study.slots import Slot
from muonlab.study.space import Setting, containing, parse_space, suggest
from muonlab.study.storage import one_sentence

optuna.logging.set_verbosity(optuna.logging.WARNING)

# The cause recorded for an attempt whose owner is dead, or has been silent so long that it counts as dead.
SILENT = "its worker gave no sign of life"


@dataclass(frozen=True)
class Claim:
    """A slot that this process has taken, its setting drawn, and the number of the attempt."""

    slot: Slot
    attempt: int


@dataclass(frozen=True)
class Attempt:
    """One trial: number, state (Optuna's name for it), the run's final status and cause, value (loss in nats),
    setting."""

    slot: str
    number: int
    state: str
    status: str
    cause: str
    value: float | None
    setting: Setting


class Queue:
    """The attempts at the slots of a study: one Optuna study for each arm of each condition, so that a sampler learns
    from its own arm alone.

    Every method raises EnvironmentFault if the storage is locked, full or out of reach. Other workers see this one as
    alive while its `heartbeat` is entered.
    """

    def __init__(self, storage: BaseStorage | str, name: str, design: Design):
        self.name, self.heartbeat = name, Heartbeat(storage, name)
        self._storage = storage
        self._searches = {
            c: searches(design, c) for c, s in design.conditions.items() if s.search is not None
        }
        self._studies: dict[tuple[str, str], optuna.Study] = {}
        self._claimed: set[tuple[str, int]] = set()

    @one_sentence()
    def claim(self, slot: Slot) -> Claim | None:
        """Take an open slot; None if a living worker has it."""
        study = self._study(slot)
        if self._holder(study, slot) is not None:
            return None
        for trial in self._attempts(study, slot):
            if trial.state == TrialState.RUNNING:  # no living worker holds the slot
                self._end(study, trial.number, "killed", SILENT, None)
        mine = self._attempt(study, slot)
        claimed = study.study_name, mine.number
        self._claimed.add(claimed)
        try:
            if self._holder(study, slot) == mine.number:
                drawn = self._drawn(study, slot, mine)
                if not self._trial(study, mine.number).state.is_finished():
                    return Claim(drawn, mine.number)
            else:
                self._withdraw(study, mine.number)
        except UpdateFinishedTrialError:
            pass  # meanwhile another worker took this one for dead
        except BaseException:
            self._claimed.discard(claimed)  # the storage failed: treat the attempt as a dead worker's
            raise
        self._claimed.discard(claimed)
        return None

    @one_sentence()
    def finish(self, claim: Claim, status: str, cause: str, loss: float | None) -> None:
        """Record an attempt's end: with a loss in nats it is complete; without one it failed and the slot is open
        again.

        Only the first end of an attempt counts, and one complete attempt per slot: a later one, which restored a
        damaged run, withdraws.
        """
        study = self._study(claim.slot)
        states = {t.state for t in self._attempts(study, claim.slot) if t.number != claim.attempt}
        withdrawn = "withdrawn" in self._trial(study, claim.attempt).user_attrs
        if withdrawn or (loss is not None and TrialState.COMPLETE in states):
            self._withdraw(study, claim.attempt)
        else:
            self._end(study, claim.attempt, status, cause, loss)
        self._claimed.discard((study.study_name, claim.attempt))

    @one_sentence()
    def busy(self, slots: Iterable[Slot]) -> set[str]:
        """The names of the slots that living workers have; reads every Optuna study once."""
        return {t.user_attrs["slot"] for study, t in self._running(slots) if self._holds(study, t)}

    @one_sentence()
    def drawn(self, slot: Slot) -> Slot | None:
        """The slot with its setting; None if its sampler has not drawn one yet."""
        if not slot.drawn:
            return slot
        setting = self._first_setting(self._study(slot), slot)
        return slot.at(setting) if setting else None

    @one_sentence()
    def running(self, slots: Sequence[Slot]) -> list[tuple[Claim, bool]]:
        """The attempts at these slots that have not ended, and whether their workers are alive."""
        named = {slot.name: slot for slot in slots}
        rows = []
        for study, trial in self._running(slots):
            slot = named.get(trial.user_attrs["slot"])
            if slot is not None and (drawn := self.drawn(slot)):
                rows.append((Claim(drawn, trial.number), not self._dead(study, trial)))
        return rows

    @one_sentence()
    def uncounted(self, slots: Iterable[Slot]) -> list[Slot]:
        """The slots without a complete or running attempt; reads every Optuna study once."""
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        studies = self._studies_of(slots)
        trials = [t for study in studies for t in study.get_trials(deepcopy=False, states=states)]
        counted = {t.user_attrs.get("slot") for t in trials if "withdrawn" not in t.user_attrs}
        return [slot for slot in slots if slot.name not in counted]

    @one_sentence()
    def attempts(self, slots: Sequence[Slot]) -> list[Attempt]:
        """Every attempt at these slots, except withdrawn ones, in the order of the slots; reads every Optuna study
        once."""
        by_slot: dict[str, list[FrozenTrial]] = {}
        for study in self._studies_of(slots):
            for trial in study.get_trials(deepcopy=False):
                if "slot" in trial.user_attrs and "withdrawn" not in trial.user_attrs:
                    by_slot.setdefault(trial.user_attrs["slot"], []).append(trial)
        rows = []
        for slot in slots:
            for trial in by_slot.get(slot.name, ()):
                about, complete = trial.user_attrs, trial.state == TrialState.COMPLETE
                status, cause = about.get("status", ""), about.get("cause", "")
                value = trial.value if complete else None
                setting = dict(slot.level.setting or trial.params)
                rows.append(Attempt(slot.name, trial.number, trial.state.name, status, cause, value, setting))
        return rows

    # ------------------------------------------------------------------ one claim
    def _attempt(self, study: optuna.Study, slot: Slot) -> FrozenTrial:
        """Create a running attempt in one transaction, and find it by its token."""
        token = uuid.uuid4().hex
        setting = self._first_setting(study, slot)
        space = self._space(slot)
        attributes = {"slot": slot.name, "token": token, "owner": Owner.this().values()}
        attributes["worker"] = self.heartbeat.token
        widened = {key: containing(space[key], setting[key]) for key in space} if setting else {}
        study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params={key: setting[key] for key in widened} if setting else {},
                distributions=widened,
                user_attrs=attributes,
            )
        )
        [mine] = [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("token") == token]
        return mine

    def _drawn(self, study: optuna.Study, slot: Slot, mine: FrozenTrial) -> Slot:
        """The slot with its setting: from its level, from its first attempt, or drawn by the sampler now."""
        if not slot.drawn:
            return slot
        space, setting = self._space(slot), self._first_setting(study, slot)
        if setting is None:
            trial = Trial(study, mine._trial_id)
            for name, distribution in space.items():
                suggest(trial, name, distribution)
            setting = dict(trial.params)
        return slot.at(setting)

    def _first_setting(self, study: optuna.Study, slot: Slot) -> Setting | None:
        """The slot's setting: its level's, or the first that an attempt drew completely."""
        if slot.level.setting:
            return slot.level.setting
        space = self._space(slot)
        for trial in self._attempts(study, slot):
            if space and trial.params.keys() == space.keys():
                return dict(trial.params)
        return None

    def _holder(self, study: optuna.Study, slot: Slot) -> int | None:
        """The number of the attempt that holds the slot."""
        return min((t.number for t in self._attempts(study, slot) if self._holds(study, t)), default=None)

    def _withdraw(self, study: optuna.Study, number: int) -> None:
        with suppress(UpdateFinishedTrialError):
            Trial(study, self._trial(study, number)._trial_id).set_user_attr("withdrawn", True)
            study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _end(self, study: optuna.Study, number: int, status: str, cause: str, loss: float | None) -> None:
        trial = Trial(study, self._trial(study, number)._trial_id)
        with suppress(UpdateFinishedTrialError):  # only its first end counts
            trial.set_user_attr("status", status)
            trial.set_user_attr("cause", cause)
            state = TrialState.FAIL if loss is None else TrialState.COMPLETE
            study.tell(number, loss, state=state, skip_if_finished=True)

    # ------------------------------------------------------------------ who lives
    def _holds(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        running = trial.state == TrialState.RUNNING and "withdrawn" not in trial.user_attrs
        return running and not self._dead(study, trial)

    def _dead(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        owner, worker = trial.user_attrs.get("owner"), trial.user_attrs.get("worker", "")
        if owner is None:
            return True
        if worker == self.heartbeat.token:  # nobody holds a claim of ours that the storage cut short
            return (study.study_name, trial.number) not in self._claimed
        alive = Owner.read(owner).alive
        return not self.heartbeat.alive(worker) if alive is None else not alive

    # ------------------------------------------------------------------ Optuna
    def _study(self, slot: Slot) -> optuna.Study:
        key = slot.condition, slot.arm
        if key not in self._studies:
            search = self._searches.get(slot.condition)
            self._studies[key] = optuna.create_study(
                study_name="/".join((self.name, *key)),
                storage=self._storage,
                sampler=_sampler(search) if search else None,
                direction="minimize",
                load_if_exists=True,
            )
        return self._studies[key]

    def _studies_of(self, slots: Iterable[Slot]) -> list[optuna.Study]:
        return list({id(study): study for study in map(self._study, slots)}.values())

    def _running(self, slots: Iterable[Slot]) -> list[tuple[optuna.Study, FrozenTrial]]:
        """The running attempts in the Optuna studies of these slots; reads each study once."""
        running = (TrialState.RUNNING,)
        trials = [
            (study, t)
            for study in self._studies_of(slots)
            for t in study.get_trials(deepcopy=False, states=running)
        ]
        return [
            (study, t) for study, t in trials if "slot" in t.user_attrs and "withdrawn" not in t.user_attrs
        ]

    def _space(self, slot: Slot) -> dict[str, BaseDistribution]:
        search = self._searches.get(slot.condition)
        return parse_space(search.optimizers[slot.arm].space) if search else {}

    @staticmethod
    def _attempts(study: optuna.Study, slot: Slot) -> list[FrozenTrial]:
        return [
            trial
            for trial in study.get_trials(deepcopy=False)
            if trial.user_attrs.get("slot") == slot.name and "withdrawn" not in trial.user_attrs
        ]

    @staticmethod
    def _trial(study: optuna.Study, number: int) -> FrozenTrial:
        return study.get_trials(deepcopy=False)[number]


def _sampler(search: SearchSettings) -> BaseSampler:
    makers = {
        "quasi_random": optuna.samplers.RandomSampler,  # never used: these settings are fixed beforehand
        "tpe": optuna.samplers.TPESampler,
        "random": optuna.samplers.RandomSampler,
        "cmaes": optuna.samplers.CmaEsSampler,
        "gp": optuna.samplers.GPSampler,
    }
    return makers[search.sampler](seed=search.seed)
