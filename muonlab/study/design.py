"""An experiment's file: its format, checked before anything runs, and the same question at another scale."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import yaml
from annotated_types import MinLen

from muonlab.cli import compose_config, plain, project_folder
from muonlab.errors import MuonlabError, shown, unknown_name
from muonlab.settings.check import Count, Positive, Seed, Steps, Text, build, check, defaults
from muonlab.settings.search import SearchSettings
from muonlab.study.reading import fault, read_yaml

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
    """What a scale changes: overrides after all others, seeds, minutes, and keys of conditions."""

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
    looks: Annotated[Sequence[Count], MinLen(1)] | None = None
    common: Overrides = ()
    conditions: Annotated[Mapping[str, Condition], MinLen(1)]
    claims: Sequence[Mapping[str, object]] = ()
    harmless: Sequence[Mapping[str, object]] = ()
    figures: Sequence[Figure] = ()
    scales: Mapping[str, Scale] = field(default_factory=dict)
    scale: str = "cpu"
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
        return [read_claim(values, conditions, self.tuning_conditions) for values in (*self.claims, *pairs)]


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


# ---------------------------------------------------------------------- reading
def load_experiment(name: str, scale: str = "cpu") -> Design:
    """experiments/<name>.yaml at a scale, checked; raises what `read_experiment` and `at_scale` raise."""
    return at_scale(read_experiment(name), scale)


def read_experiment(name: str) -> Design:
    """experiments/<name>.yaml, checked. Raises MuonlabError for an unknown name, with the near ones."""
    paths = {path.stem: path for path in project_folder("experiments").glob("*.yaml")}
    if name not in paths:
        raise unknown_name("experiment", name, paths)
    return read_design(paths[name])


def read_design(path: Path) -> Design:
    """The design in a file. Raises MuonlabError for a file that is not YAML or breaks the format."""
    try:
        return make_design(read_yaml(path.read_text(encoding="utf-8")), path.name)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MuonlabError(f"{path.name} is not YAML: {fault(error)}") from error


def make_design(values: object, where: str = "the experiment") -> Design:
    """A design from plain values.

    Raises MuonlabError, naming what is near, for an unknown or missing key and for a design that cannot be run.
    """
    if not isinstance(values, Mapping):
        raise MuonlabError(f"{where} must hold a mapping of settings")
    try:
        design = build(Design, _with_figures(values), "")
    except MuonlabError as error:
        raise MuonlabError(f"{where}: {error}") from error
    for scale, section in design.scales.items():
        for name, changed in section.conditions.items():
            _known([name], design.conditions, f"condition of scale {scale} in {where}")
            _known(
                changed,
                Condition.__dataclass_fields__,
                f"key of condition {name} at scale {scale} in {where}",
            )
    for name, condition in design.conditions.items():
        _check_times(name, condition, where)
        if condition.tuned_on is not None:
            _check_tuning(design, name, condition, where)
        if condition.search is not None:
            _check_search(design, name, condition, where)
        if not design.arms_of(name):
            raise MuonlabError(f"condition '{name}' of {where} has no arms")
    _check_questions(design, where)
    return design


def _with_figures(values: Mapping[str, object]) -> Mapping[str, object]:
    figures = values.get("figures")
    if not isinstance(figures, Sequence) or isinstance(figures, str):
        return values
    return {**values, "figures": [_figure(each) for each in figures]}


def _figure(values: object) -> Figure:
    if isinstance(values, Figure):
        return values
    if not isinstance(values, Mapping):
        raise MuonlabError(f"a figure must be a mapping of settings, not {shown(values)}")
    name = check(Text, values.get("name"), "a figure's name")
    lists = {
        key: check(Sequence[str], values[key], f"{key} of figure {name}")
        for key in ("conditions", "arms")
        if key in values
    }
    settings = {str(key): value for key, value in values.items() if key not in ("name", "kind", *lists)}
    return Figure(name, check(Text, values.get("kind"), f"kind of figure {name}"), **lists, settings=settings)


def at_scale(design: Design, scale: str) -> Design:
    """The same question at `scale`: with its `seeds` and `minutes`, the keys that its `conditions` change, and its
    overrides for every run as `scale_common`.

    "cpu" is the file as written, unless the file defines it. Raises MuonlabError for a scale that the file lacks.
    """
    scales = {"cpu": Scale(), **design.scales}
    if scale not in scales:
        raise unknown_name("scale", scale, scales)
    changes = scales[scale]
    conditions = {
        name: _with(section, name, changes.conditions.get(name, {}))
        for name, section in design.conditions.items()
    }
    return replace(
        design,
        conditions=conditions,
        seeds=changes.seeds or design.seeds,
        minutes=changes.minutes or design.minutes,
        scales={},
        scale=scale,
        scale_common=tuple(changes.common),
    )


def _with(section: Condition, name: str, changed: Mapping[str, object]) -> Condition:
    """The condition with what a scale changes in it."""
    typed = build(Condition, changed, f"condition {name}")
    kept = {key: value for key, value in vars(section).items() if key not in changed}
    return Condition(**kept | {key: getattr(typed, key) for key in changed})


# ---------------------------------------------------------------------- checks
def _check_questions(design: Design, where: str) -> None:
    figures = [figure.name for figure in design.figures]
    try:
        claims = design.all_claims()
    except MuonlabError as error:
        raise MuonlabError(f"{where}: {error}") from error
    for claim in claims:
        if claim.figure and claim.figure not in figures:
            raise unknown_name(f"figure of '{claim.claim}' in {where}", claim.figure, figures)
    for figure in design.figures:
        _known(figure.conditions, design.conditions, f"condition of figure {figure.name} in {where}")


def _check_search(design: Design, name: str, section: Condition, where: str) -> None:
    if section.vary is not None or section.levels is not None:
        raise MuonlabError(f"condition '{name}' of {where} has both a search and levels; give one of them")
    search = searches(design, name)
    if search.adaptive and len(design.seeds_of(name)) > 1:
        raise MuonlabError(
            f"condition '{name}' of {where} has {len(design.seeds_of(name))} seeds, but the sampler {search.sampler}"
            " learns from one run per setting; give it one seed, or use quasi_random"
        )
    for arm in design.arms_of(name):
        if arm not in search.optimizers:
            raise unknown_name(f"searched optimizer of condition {name} in {where}", arm, search.optimizers)


def _check_times(name: str, section: Condition, where: str) -> None:
    if section.times is None:
        return
    if section.tuned_on is None or section.vary is not None or section.levels is not None:
        raise MuonlabError(
            f"condition '{name}' of {where} has `times`, which multiplies what it is `tuned_on`, and no levels"
        )
    if len(section.times) != 1:
        raise MuonlabError(
            f"`times` of condition '{name}' of {where} takes one key, not {len(section.times)}"
        )


def _check_tuning(design: Design, name: str, section: Condition, where: str) -> None:
    search = section.tuned_on
    assert search is not None
    if search not in design.conditions:
        raise unknown_name(f"condition for {name} to be tuned on", search, design.conditions)
    if design.conditions[search].tuned_on:
        raise MuonlabError(f"condition '{name}' of {where} is tuned on '{search}', which is itself tuned")
    for arm in section.arms:
        if arm not in design.arms_of(search):
            raise unknown_name(f"arm of {search} to tune {name} on", arm, design.arms_of(search))
    shared = sorted(set(design.seeds_of(name)) & set(design.seeds_of(search)))
    if shared:
        raise MuonlabError(
            f"condition '{name}' of {where} is tuned on '{search}' with the same seed {shared[0]}: "
            "the seeds that chose a setting cannot judge it"
        )


def _known(names: Iterable[object], known: Iterable[str], kind: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise unknown_name(kind, str(name), known)
