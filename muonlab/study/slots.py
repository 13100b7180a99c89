"""The runs of a design, at its levels or drawn by a sampler: each is a slot with its own name."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product

from muonlab.cli import parse_overrides
from muonlab.errors import MuonlabError, located
from muonlab.settings.search import SearchSettings, Setting, SpaceSettings
from muonlab.study.design import Arm, Condition, Design, LevelValue, searches
from muonlab.train.config import RunConfig, read_section

Compose = Callable[[list[str]], RunConfig]
PUBLISHED = "published"


@dataclass(frozen=True)
class Level:
    """One level of what a condition varies: its value, or its name (None: nothing varies), and its overrides.

    `setting` is that of a search, {key of the optimizer: value}; empty where the sampler has not drawn it yet. `axes`
    is that of `vary`, {key: value}.
    """

    value: LevelValue
    overrides: tuple[str, ...] = ()
    setting: Setting | None = None
    axes: Mapping[str, object] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        if self.value is None:
            return ""
        return f"{self.value:g}" if isinstance(self.value, float) else self.value

    def __hash__(self) -> int:
        return hash((self.value, self.overrides))


@dataclass(frozen=True)
class Slot:
    """One run of a study: its place in the design and its settings.

    `config` is what is trained. If a sampler draws the level, `drawn` is true and `config` is the arm's without it.
    """

    condition: str
    arm: str
    level: Level
    seed: int
    config: RunConfig
    drawn: bool = False

    @property
    def name(self) -> str:
        """Unique within its study: raised/muon/s1, search/muon/0.03/s0, search/muon/published/s0."""
        level = str(self.level).replace("/", "_")
        return "/".join(part for part in (self.condition, self.arm, level, f"s{self.seed}") if part)

    @property
    def label(self) -> str:
        """The name, usable as a file name."""
        return self.name.replace("/", "-")

    def at(self, setting: Setting) -> "Slot":
        """The slot with a setting that its sampler drew."""
        level = replace(self.level, setting=setting, overrides=_overrides(setting))
        return replace(self, level=level, config=_at(self.config, setting))


def slots(
    design: Design,
    compose: Compose,
    overrides: Sequence[str] = (),
    tuned: Mapping[str, Mapping[str, Level]] | None = None,
) -> list[Slot]:
    """Every run of the design, seeds outermost, so that an interrupted study has whole rounds of all arms.

    compose: overrides -> settings of a run. overrides: those of every run, after the design's and its scale's. tuned:
    {search condition: {arm: its best level}}; None leaves out conditions that are tuned on others. Raises MuonlabError
    for an override of the seed or of what a condition varies, since those belong to the design, and for levels that
    give the same run.
    """
    everywhere = [*design.scale_common, *overrides]
    if "seed" in keys(everywhere):
        raise MuonlabError(
            "seed cannot be set for every run, since a study has seeds of its own: `seeds` in an experiment's file,"
            " search.seed and search.replicate_seeds in a sweep"
        )
    rounds: list[tuple[int, Slot]] = []
    for condition, section in design.conditions.items():
        if section.tuned_on and tuned is None:
            continue
        for arm, details in design.arms_of(condition).items():
            _refuse_varied(condition, details.overrides, overrides)
            best = tuned[section.tuned_on][arm] if section.tuned_on and tuned is not None else None
            identities: set[str] = set()
            base = cache(partial(_settings, design, section, details, (), everywhere, compose))
            for level in _levels(design, condition, arm, details, best):
                tuned_to = best.overrides if best is not None and best is not level else ()
                of_level = [each for each in tuned_to if not keys([each]) & keys(level.overrides)]
                of_level += level.overrides
                if "seed" in keys(of_level):
                    raise MuonlabError(
                        f"the seeds are the experiment's own; condition '{condition}' varies them"
                    )
                _refuse_varied(condition, of_level, everywhere)
                # The levels of a search differ in one section, and a composition takes a tenth of a second.
                if level.setting:
                    config = _at(base(), level.setting)
                else:
                    config = _settings(design, section, details, of_level, everywhere, compose)
                if level.setting != {}:
                    if config.identity in identities:
                        raise MuonlabError(
                            f"level '{level}' of {condition}/{arm} gives the same run as another level"
                        )
                    identities.add(config.identity)
                for position, seed in enumerate(design.seeds_of(condition)):
                    slot = Slot(condition, arm, level, seed, config.with_seed(seed), level.setting == {})
                    rounds.append((position, slot))
    return [slot for _, slot in sorted(rounds, key=lambda entry: entry[0])]


def _settings(
    design: Design,
    section: Condition,
    arm: Arm,
    of_level: Sequence[str],
    everywhere: Sequence[str],
    compose: Compose,
) -> RunConfig:
    shared = [*design.common, *section.common]
    if section.windows is not None:
        shared.append(f"optimizer.windows={_text([list(window) for window in section.windows])}")
    # The last choice of a group wins, so the arm's overrides come after its condition's.
    return compose([*shared, *arm.overrides, *of_level, "trainer.progress=false", *everywhere])


def _levels(design: Design, condition: str, name: str, arm: Arm, best: Level | None) -> list[Level]:
    """Of one arm, given the level that it was tuned to."""
    section = design.conditions[condition]
    if best is not None and section.times is not None:
        [(key, factors)] = section.times.items()
        axes = best.axes or _axes(best.setting or {})
        if key not in axes:
            raise MuonlabError(
                f"`times` of {condition} multiplies {key}, which {section.tuned_on} does not vary for {name}"
            )
        return [_multiple(axes, key, factor) for factor in factors]
    return levels_of(design, condition, name, arm) or [best or Level(None)]


def levels_of(design: Design, condition: str, name: str, arm: Arm) -> list[Level]:
    """The levels of an arm: its own `vary` or `levels`, or its condition's, or its search's; none if nothing varies.

    `vary` is {key: values}, or {"key,key": [[value, value], ...]} for keys that move together, of which the first one's
    value is the level; of several such entries, every combination. `levels` is {name: overrides}; a number for a name
    is a number in every table.
    """
    section = design.conditions[condition]
    for place in (arm, section):
        if place.vary is not None and place.levels is not None:
            raise MuonlabError("a condition or arm takes `vary` or `levels`, not both")
        if place.levels is not None:
            return [Level(_value(label), tuple(overrides)) for label, overrides in place.levels.items()]
        if place.vary is not None:
            axes = [[_level(varied.split(","), row) for row in rows] for varied, rows in place.vary.items()]
            return [_combined(levels) for levels in product(*axes)]
    return searched_levels(searches(design, condition), name) if section.search is not None else []


def searched_levels(search: SearchSettings, optimizer: str) -> list[Level]:
    """The settings of one optimizer in the order in which they are tried: published, 1, 2, ...

    An adaptive sampler's are empty until they are drawn.
    """
    from muonlab.study.space import parse_space, quasi_random

    section = search.optimizers[optimizer]
    space = parse_space(section.space)
    count = search.trials - 1
    drawn: list[Setting] = [{}] * count if search.adaptive else quasi_random(space, count, search.seed)
    settings = {PUBLISHED: dict(section.published)} | {str(i): s for i, s in enumerate(drawn, start=1)}
    return [Level(name, _overrides(setting), setting) for name, setting in settings.items()]


def check_spaces(design: Design, compose: Compose, overrides: Sequence[str] = ()) -> None:
    """Raises MuonlabError for anything that a run of a search would refuse: overrides, the published setting, the ends
    of a range, or a choice."""
    everywhere = [*design.scale_common, *overrides]
    for condition, section in design.conditions.items():
        if section.search is not None:
            for name, details in design.arms_of(condition).items():
                config = _settings(design, section, details, (), everywhere, compose)
                _check_space(
                    config, searches(design, condition).optimizers[name], f"search.optimizers.{name}"
                )


def _check_space(config: RunConfig, section: SpaceSettings, place: str) -> None:
    from muonlab.study.space import containing, extremes, parse_space  # imports Optuna

    with located(f"{place}.published"):
        _at(config, section.published)
    with located(place):
        distributions = parse_space(section.space)
    for key, distribution in distributions.items():
        with located(f"{place}.published.{key}"):
            containing(distribution, section.published[key])
        with located(f"{place}.space.{key}"):
            for value in extremes(distribution):
                _at(config, {**section.published, key: value})


def _at(config: RunConfig, setting: Mapping[str, object]) -> RunConfig:
    """The run with these settings of its optimizer."""
    values = config.as_dict()["optimizer"] | dict(setting)
    return replace(config, optimizer=read_section("optimizer", values))


def _overrides(setting: Setting) -> tuple[str, ...]:
    return _assigned(_axes(setting))


def _axes(setting: Setting) -> dict[str, object]:
    """The settings of a search by their keys."""
    return {f"optimizer.{key}": value for key, value in setting.items()}


def _level(varied: list[str], row: object) -> Level:
    values = row if len(varied) > 1 else [row]
    if not isinstance(values, list) or len(values) != len(varied):
        raise MuonlabError(f"`vary` of {','.join(varied)} needs {len(varied)} values per level, not {row}")
    axes = {key.strip(): value for key, value in zip(varied, values, strict=True)}
    return Level(_value(values[0]), _assigned(axes), axes=axes)


def _combined(levels: Sequence[Level]) -> Level:
    if len(levels) == 1:
        return levels[0]
    axes = {key: value for level in levels for key, value in level.axes.items()}
    return Level(" ".join(map(str, levels)), _assigned(axes), axes=axes)


def _multiple(tuned: Mapping[str, object], key: str, factor: float) -> Level:
    """The tuned values with one of them multiplied; the level's name is the factor."""
    value = tuned[key]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise MuonlabError(f"`times` multiplies {key}, whose best value is {value!r} and not a number")
    axes = {**tuned, key: float(f"{factor * value:.6g}")}
    return Level(float(factor), _assigned(axes), axes=axes)


def _assigned(axes: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(f"{key}={_text(value)}" for key, value in axes.items())


def _value(value: object) -> float | str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return "none" if value is None else _text(value)


def _text(value: object) -> str:
    # Hydra's grammar for lists, null, true and numbers is JSON's.
    return value if isinstance(value, str) else json.dumps(value)


def keys(overrides: Sequence[str]) -> set[str]:
    """The config keys that these overrides set."""
    return set(map(_key, overrides))


@cache
def _key(override: str) -> str:
    return parse_overrides([override])[0].key_or_group


def _refuse_varied(condition: str, own: Sequence[str], everywhere: Sequence[str]) -> None:
    varied = keys(own)
    for override in everywhere:
        if keys([override]) & varied:
            raise MuonlabError(f"'{override}' cannot be set for every run: condition '{condition}' varies it")
