"""The runs of an experiment: conditions x arms x levels x seeds, each with its resolved config."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from muonlab.cli import compose_config, plain
from muonlab.errors import MuonlabError
from muonlab.experiment.spec import seeds_of

LevelValue = float | str | None


@dataclass(frozen=True)
class Level:
    """One setting of what a condition varies: its value, or a name for it (None: nothing varies), and its overrides."""

    value: LevelValue
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            "" if self.value is None else f"{self.value:g}" if isinstance(self.value, float) else self.value
        )


@dataclass(frozen=True)
class Cell:
    """One run of an experiment: where it stands in the design, and its resolved config."""

    condition: str
    arm: str
    level: Level
    seed: int
    config: dict[str, Any]

    @property
    def label(self) -> str:
        """A name for logs and progress."""
        parts = [self.condition, self.arm, str(self.level).replace("/", "_"), f"s{self.seed}"]
        return "-".join(part for part in parts if part)


def cells(
    name: str,
    spec: Mapping[str, Any],
    overrides: list[str],
    tuned: Mapping[str, Mapping[str, Level]] | None = None,
) -> list[Cell]:
    """Every run of the experiment, seeds outermost, so that an interrupted one has whole rounds of all arms.

    overrides: Hydra overrides of every run, after the experiment's own and its scale's. tuned: {search condition:
    {arm: its best level}}; without it the conditions that are tuned on others are left out. Raises MuonlabError for an
    override of the seed or of what a condition varies, since those are the design's, and for levels that are one run.
    """
    if any(o.lstrip("+").startswith("seed=") for o in overrides):
        raise MuonlabError("the seeds are the experiment's own; change `seeds` in its file")
    everywhere = [*spec.get("scale_common", ()), *overrides]
    found: list[tuple[int, Cell]] = []
    for condition, section in spec["conditions"].items():
        if "tuned_on" in section and tuned is None:
            continue
        for arm, details in section["arms"].items():
            details = details if isinstance(details, Mapping) else {"overrides": details}
            best = [tuned[section["tuned_on"]][arm]] if "tuned_on" in section else []
            configs: list[dict[str, Any]] = []
            for level in levels_of(section, details) or best or [Level(None)]:
                chosen = [*(o for b in best if b is not level for o in b.overrides), *level.overrides]
                _refuse_chosen(condition, chosen, everywhere)
                shared = [*spec.get("common", ()), *section.get("common", ())]
                shared += [f"optimizer.windows={_text(section['windows'])}"] if "windows" in section else []
                own = [*details.get("overrides", ()), *chosen]
                config = _compose(name, f"{condition}/{arm}", shared, own, everywhere)
                if config in configs:
                    raise MuonlabError(f"level '{level}' of {condition}/{arm} is the same run as another")
                configs.append(config)
                for round_, seed in enumerate(seeds_of(spec, condition)):
                    found.append((round_, Cell(condition, arm, level, seed, config | {"seed": seed})))
    return [cell for _, cell in sorted(found, key=lambda item: item[0])]


def levels_of(section: Mapping[str, Any], arm: Mapping[str, Any]) -> list[Level]:
    """The levels of an arm: its own `vary` or `levels`, or else its condition's; none where nothing varies.

    `vary` is {key: values}, or {"key,key": [[value, value], ...]} for keys that move together, of which the first one's
    value is the level. `levels` is {name: overrides}; a number for a name is a number in every table.
    """
    for place in (arm, section):
        if "vary" in place and "levels" in place:
            raise MuonlabError("a condition or arm has either `vary` or `levels`, not both")
        if "levels" in place:
            return [Level(_value(label), tuple(given)) for label, given in place["levels"].items()]
        if "vary" in place:
            if len(place["vary"]) != 1:
                raise MuonlabError(
                    f"`vary` takes one key (or several as 'a,b' with lists of values), not {list(place['vary'])}"
                )
            [(keys, rows)] = place["vary"].items()
            return [_level(keys.split(","), row) for row in rows]
    return []


def _level(keys: list[str], row: Any) -> Level:
    values = row if len(keys) > 1 else [row]
    if not isinstance(values, list) or len(values) != len(keys):
        raise MuonlabError(f"`vary` of {','.join(keys)} needs {len(keys)} values a level, not {row}")
    given = tuple(f"{key.strip()}={_text(value)}" for key, value in zip(keys, values, strict=True))
    return Level(_value(values[0]), given)


def _value(value: Any) -> float | str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number else "none" if value is None else _text(value)


def _text(value: Any) -> str:
    # Hydra's grammar for lists, null, true and numbers is JSON's.
    return value if isinstance(value, str) else json.dumps(value)


def _refuse_chosen(condition: str, chosen: list[str], everywhere: list[str]) -> None:
    keys = {override.partition("=")[0] for override in chosen}
    for override in everywhere:
        if override.partition("=")[0] in keys:
            raise MuonlabError(f"'{override}' cannot be set for every run: condition '{condition}' varies it")


def _compose(
    name: str, role: str, shared: list[str], own: list[str], everywhere: list[str]
) -> dict[str, Any]:
    # The last choice of a group wins, so the arm's own stands behind what its condition shares.
    chosen = [*shared, *own, "trainer.progress=false", *everywhere]
    config = plain(compose_config("train", chosen))
    if config["tracking"]["name"] != "none":
        config["tracking"] |= {"study": name, "role": role}
    return config
