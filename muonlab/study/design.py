"""A design: what an experiment's file may say. `muonlab.study.reading` reads and checks one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated

from annotated_types import MinLen

from muonlab.cli import compose_config, plain
from muonlab.settings.check import Count, Positive, Seed, Steps, Text, build, check, defaults
from muonlab.settings.search import SearchSettings

if TYPE_CHECKING:
    from analysis.claims import Claim

Overrides = Sequence[str]
Seeds = Annotated[Sequence[Seed], MinLen(1)]
LevelValue = float | str | None
# {key: values}, or {"key,key": rows of values} for keys that move together; of several, every combination.
Varied = Mapping[str, Sequence[object]]
Named = Mapping[object, Overrides]  # {level: overrides}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """overrides: those of the arm's runs, besides their condition's. vary, levels: levels of the arm's own."""

    overrides: Overrides = ()
    vary: Varied | None = None
    levels: Named | None = None


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What its arms share: overrides (`common`), seeds (none: the experiment's), and one of the following.

    vary, levels: every arm at every level. search: an Optuna search in place of levels, {sampler, trials, optimizers
    with their spaces, ...} or the name of one in conf/search; without arms, one arm for each of its optimizers.
    tuned_on: the search or the condition with levels whose best level every arm takes. times: {key: factors} of that
    level's value. extend: how often the ranges of `vary` may grow where a best level is at an edge, for all arms alike.
    windows: the steps in which the clip acts. heads: every head's trace is kept.
    """

    about: str = ""
    arms: Mapping[str, object] = field(default_factory=dict)
    common: Overrides = ()
    seeds: Seeds | None = None
    vary: Varied | None = None
    levels: Named | None = None
    search: str | Mapping[str, object] | None = None
    tuned_on: str | None = None
    times: Mapping[str, Annotated[Sequence[Positive], MinLen(1)]] | None = None
    extend: Steps = 0
    windows: Sequence[tuple[int, int]] | None = None
    heads: bool = False


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a scale changes: overrides after all others, seeds, minutes, keys of conditions, and the prediction.

    about: what its answers hold for, said after every claim.
    """

    about: str = ""
    prediction: str = ""
    common: Overrides = ()
    seeds: Seeds | None = None
    minutes: float | None = None
    conditions: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A figure that the design asks for.

    conditions, arms: the runs that it draws; none: all. settings: everything else, which its kind checks when it is
    drawn (analysis.figures).
    """

    name: str
    kind: str
    conditions: Sequence[str] = ()
    arms: Sequence[str] = ()
    settings: Mapping[str, object] = field(default_factory=dict)

    def as_mapping(self) -> dict[str, object]:
        """As a file asks for it."""
        values = {"name": self.name, "kind": self.kind, "conditions": self.conditions, "arms": self.arms}
        return {key: value for key, value in values.items() if value} | dict(self.settings)

    def draws(self, conditions: Collection[str], arm: str) -> bool:
        """Whether it shows this arm under all of these conditions."""
        shown = not self.conditions or set(conditions) <= set(self.conditions)
        return shown and (not self.arms or arm in self.arms)


@dataclass(frozen=True, kw_only=True)
class Design:
    """One file of experiments/: said before any run, then what is run and how it is judged and drawn.

    asks: {name: what the command line gave, or an example} (muonlab.study.asking).
    looks: how many seeds there are at each planned judgement, where seeds are to be added; None: at one only.
    """

    question: Text
    prediction: Text
    source: Text
    held_equal: Text
    tuning: Text
    primary: Text
    minutes: float
    seeds: Seeds
    asks: Mapping[str, float | str] = field(default_factory=dict)
    looks: Annotated[Sequence[Count], MinLen(1)] | None = None
    common: Overrides = ()
    conditions: Annotated[Mapping[str, Condition], MinLen(1)]
    claims: Sequence[Mapping[str, object]] = ()
    harmless: Sequence[Mapping[str, object]] = ()
    figures: Sequence[Figure] = ()
    scales: Mapping[str, Scale] = field(default_factory=dict)
    scale: str = "cpu"
    scale_about: str = ""
    scale_common: Overrides = ()

    def as_mapping(self) -> dict[str, object]:
        """Plain values that `make_design` reads, without those at their defaults."""
        return {key: _plain(value) for key, value in _changed(self).items()}

    @property
    def tuning_conditions(self) -> set[str]:
        """The conditions that others are tuned on."""
        return {section.tuned_on for section in self.conditions.values() if section.tuned_on}

    def seeds_of(self, condition: str) -> list[int]:
        """The seeds of a condition: its own, or the experiment's."""
        return list(self.conditions[condition].seeds or self.seeds)

    def arms_of(self, condition: str) -> dict[str, Arm]:
        """The arms of a condition; a search without arms has one for each of its optimizers, and so has any condition
        tuned on it."""
        section = self.conditions[condition]
        if section.arms:
            return {str(name): _arm(name, values) for name, values in section.arms.items()}
        if section.search is not None:
            searched = searches(self, condition).optimizers
            return {name: Arm(overrides=(f"optimizer={name}",)) for name in searched}
        return self.arms_of(section.tuned_on) if section.tuned_on else {}

    def all_claims(self) -> "list[Claim]":
        """The checked claims in the order of their answers: `claims`, then one for each pair of `harmless`."""
        pairs = []
        for pair in self.harmless:
            claim = f"The clip is harmless at a {pair.get('condition')} learning rate"
            words = {"claim": claim, "source": "K2 App. D", "harmless": pair.get("baseline")}
            pairs.append(words | {key: value for key, value in pair.items() if key != "baseline"})
        if not self.claims and not pairs:
            return []
        from analysis.claims import (
            read_claim,  # imports pandas; mistakes in a search are reported without it
        )

        conditions = {name: self.arms_of(name) for name in self.conditions}
        claims = [read_claim(values, conditions, self.tuning_conditions) for values in (*self.claims, *pairs)]
        return [claim.about(self.scale_about) for claim in claims] if self.scale_about else claims


def _plain(section: object) -> object:
    if isinstance(section, Mapping):
        return {key: _plain(value) for key, value in section.items()}
    if isinstance(section, list | tuple):
        return [_plain(value) for value in section]
    if isinstance(section, Figure):
        return _plain(section.as_mapping())
    if isinstance(section, Condition | Scale):
        return {key: _plain(value) for key, value in _changed(section).items()}
    return section


def _changed(section: "Design | Condition | Scale") -> dict[str, object]:
    """The fields that differ from their defaults."""
    usual = defaults(type(section))
    values = {spec.name: getattr(section, spec.name) for spec in fields(section)}
    return {key: value for key, value in values.items() if key not in usual or value != usual[key]}


def _arm(name: object, values: object) -> Arm:
    settings = values if isinstance(values, Mapping) else {"overrides": values}
    return build(Arm, settings, f"arm {name}")


def searches(design: Design, condition: str) -> SearchSettings:
    """The search of a condition that has one."""
    search = design.conditions[condition].search
    values = _named_search(search) if isinstance(search, str) else search
    return build(SearchSettings, values or {}, "search")


@cache
def _named_search(name: str) -> Mapping[str, object]:
    return check(Mapping[str, object], plain(compose_config("sweep", [f"search={name}"]))["search"], "search")
