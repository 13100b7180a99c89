"""A claim of an experiment's file as an object: what it asks and of which runs, checked before any is trained."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from analysis.frames import Frames
from analysis.measures import Quantity, read_quantity
from analysis.run_tests import RUN_TESTS
from muonlab.errors import MuonlabError, unknown_name
from muonlab.settings.check import Text, check

ANSWERS = ("reproduced", "not reproduced", "opposite", "tie", "not testable")
DIRECTIONS = ("lower", "higher", "tie")
Level = int | float | str
KEYS: dict[str, Any] = {
    "claim": Text,
    "source": Text,
    "arm": Text,
    "condition": Text,
    "conditions": Sequence[str],
    "level": Level,
    "levels": Sequence[Level],
    "test": str,
    "harmless": str,
    "metric": str,
    "measure": str | Mapping[str, Any],
    "baseline": str | Mapping[str, Any],
    "expect": bool | str,
    "as": Literal["ratio"],
    "above": float,
    "below": float,
    "at_least": float,
    "contradicts": str,
    "sides": Mapping[str, str],
    "figure": str,
}
SIDE = ("arm", "condition", "conditions", "level", "levels")


@dataclass(frozen=True)
class Side:
    """The runs on one side of a claim. levels: none: all. inherited: the levels are those of the claim's arm, and mean
    nothing for a baseline whose condition varies nothing."""

    arm: str
    conditions: tuple[str, ...]
    levels: tuple[Level, ...] = ()
    inherited: bool = False

    def of(self, frames: Frames) -> Frames:
        """Its runs. Raises MuonlabError where there is none."""
        runs = frames.select(self.conditions, [self.arm])
        varied = "level" in runs.runs and runs.runs["level"].notna().any()
        if not self.levels or (self.inherited and not varied):
            return runs
        return runs.select(levels=self.levels)


@dataclass(frozen=True)
class Tested:
    """A test of each run (analysis.run_tests) holds in every judged seed, or in none."""

    test: str
    expect: bool


@dataclass(frozen=True)
class Harmless:
    """A clip leaves the loss as it is without."""

    baseline: Side


@dataclass(frozen=True)
class Ranged:
    """The interval of a quantity, or of its paired difference (or ratio) to a baseline, lies between `above` and
    `below`; None: no limit."""

    quantity: Quantity
    above: float | None
    below: float | None
    baseline: Side | None
    ratio: bool


@dataclass(frozen=True)
class Compared:
    """A quantity is lower or higher than the baseline's, by `at_least` so much (a factor for a ratio), or a tie."""

    quantity: Quantity
    expect: str
    at_least: float | None
    baseline: Side
    ratio: bool


@dataclass(frozen=True)
class Claim:
    """claim, source: sentences. asked: how it is judged. contradicts: the disagreement between papers that it is about;
    sides: by answer, whose side the evidence is on. figure: the one that shows it; "": whichever draws its runs."""

    claim: str
    source: str
    side: Side
    asked: Tested | Harmless | Ranged | Compared
    contradicts: str = ""
    sides: Mapping[str, str] = field(default_factory=dict)
    figure: str = ""

    @property
    def arms(self) -> set[str]:
        """The arms that it rests on."""
        baseline = None if isinstance(self.asked, Tested) else self.asked.baseline
        return {self.side.arm} | ({baseline.arm} if baseline else set())


def read_claim(
    values: Mapping[str, Any], conditions: Mapping[str, Collection[str]], searched: Collection[str] = ()
) -> Claim:
    """The claim in a mapping. experiments/README.md describes its keys.

    conditions: the experiment's arms by condition. searched: the conditions whose seeds chose a setting, and may only
    show a sweep's shape. Raises MuonlabError for a claim that no runs could answer, before any has been trained.
    """
    if not values.get("claim") or not values.get("source"):
        raise MuonlabError(
            f"the claim '{values.get('claim', '')}' needs `claim` and `source`, a sentence each"
        )
    name = str(values["claim"])
    given = _checked(values, KEYS, name)
    if "arm" not in given or not {"condition", "conditions"} & set(given):
        raise MuonlabError(f"the claim '{name}' needs `arm`, and `condition` or `conditions`")
    side = _side(given)
    _check_side(side, conditions, name, "arm")
    asked = _asked(given, side, name)
    if not isinstance(asked, Tested) and asked.baseline:
        _check_side(asked.baseline, conditions, name, "baseline")
    shape = isinstance(asked, Ranged | Compared) and asked.quantity.kind != "run" and not asked.quantity.picks
    if set(side.conditions) & set(searched) and not shape:
        raise MuonlabError(f"the claim '{name}' rests on seeds that chose a setting; judge it on fresh ones")
    for answer in given.get("sides", ()):
        if answer not in ANSWERS:
            raise unknown_name(f"answer in `sides` of '{name}'", answer, ANSWERS)
    extra = {key: given[key] for key in ("contradicts", "sides", "figure") if key in given}
    return Claim(name, given["source"], side, asked, **extra)


def _checked(values: Mapping[str, Any], keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    for key in values:
        if key not in keys:
            raise unknown_name(f"key of the claim '{name}'", str(key), keys)
    return {key: check(keys[key], value, f"`{key}` of the claim '{name}'") for key, value in values.items()}


def _side(given: Mapping[str, Any]) -> Side:
    conditions = given["conditions"] if "conditions" in given else [given["condition"]]
    levels = given["levels"] if "levels" in given else [given["level"]] if "level" in given else []
    return Side(given["arm"], tuple(conditions), tuple(levels))


def _baseline(given: str | Mapping[str, Any], side: Side, name: str) -> Side:
    """The claim's own side but for what the baseline says."""
    own = {"arm": given} if isinstance(given, str) else dict(given)
    own = _checked(own, {key: KEYS[key] for key in SIDE}, name)
    complete = {"arm": side.arm, **own}
    if not {"condition", "conditions"} & set(own):
        complete["conditions"] = side.conditions
    if not {"level", "levels"} & set(own):
        return replace(_side(complete), levels=side.levels, inherited=True)
    return _side(complete)


def _check_side(side: Side, conditions: Mapping[str, Collection[str]], name: str, role: str) -> None:
    for condition in side.conditions:
        if condition not in conditions:
            raise unknown_name(f"condition of '{name}'", condition, conditions)
        if side.arm not in conditions[condition]:
            raise unknown_name(f"{role} of '{name}'", side.arm, conditions[condition])


def _asked(given: Mapping[str, Any], side: Side, name: str) -> Tested | Harmless | Ranged | Compared:
    if "test" in given:
        if given["test"] not in RUN_TESTS:
            raise unknown_name(f"test of '{name}'", given["test"], RUN_TESTS)
        if not isinstance(given.get("expect"), bool):
            raise MuonlabError(
                f"the claim '{name}' is about a test of each run, so `expect` is true or false"
            )
        return Tested(given["test"], given["expect"])
    if "harmless" in given:
        return Harmless(_baseline(given["harmless"], side, name))
    text = given.get("measure", given.get("metric"))
    if text is None or not ({"expect", "above", "below"} & set(given)):
        raise MuonlabError(
            f"the claim '{name}' has no test, and no metric or measure with `expect`, `above` or `below`"
        )
    quantity = read_quantity(text)
    if "metric" in given and quantity.name != given["metric"]:
        raise MuonlabError(f"the claim '{name}' has a `metric` and a `measure`; it takes one of them")
    baseline = _baseline(given["baseline"], side, name) if "baseline" in given else None
    if quantity.kind == "pair" and baseline is None:
        raise MuonlabError(
            f"measure {quantity.name} compares two arms, so the claim '{name}' needs a `baseline`"
        )
    ratio = "as" in given
    if "expect" not in given:
        return Ranged(quantity, given.get("above"), given.get("below"), baseline, ratio)
    if given["expect"] not in DIRECTIONS:
        raise unknown_name(f"`expect` of '{name}'", given["expect"], DIRECTIONS)
    if baseline is None:
        raise MuonlabError(f"the claim '{name}' expects '{given['expect']}' but names no `baseline`")
    return Compared(quantity, given["expect"], given.get("at_least"), baseline, ratio)
