"""A claim of an experiment's file as an object: what it asks and of which runs, checked before any is trained."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict, cast, get_type_hints

from analysis.columns import METRICS
from analysis.comparison import LOSS_MARGIN
from analysis.frames import Frames
from analysis.measures import Quantity, read_quantity
from analysis.run_tests import RUN_TESTS
from muonlab.errors import MuonlabError, unknown_name
from muonlab.settings.check import Positive, Share, Text, check

ANSWERS = ("reproduced", "contradicted", "equivalent", "unresolved", "not seen here", "not testable")
# The answers that name a side of a disagreement: the others say what these runs could not.
SETTLED = ANSWERS[:3]
DIRECTIONS = ("lower", "higher", "equal")
MOST = 0.5  # the share of runs that a claim is about at least, unless it says that some are
LOGIT_MARGIN = 1.25  # a factor between two max logits that makes no difference
OWN = "muonlab"  # the first word of the source of a claim that no paper makes
Level = int | float | str
Keys = TypedDict(
    "Keys",
    {
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
        "measure": str | Mapping[str, object],
        "baseline": str | Mapping[str, object],
        "expect": bool | str,
        "as": Literal["ratio"],
        "above": float,
        "below": float,
        "at_least": float,
        "margin": Positive,
        "share": Share,
        "control": Mapping[str, object],
        "precondition": Mapping[str, object],
        "not_testable": Text,
        "contradicts": str,
        "sides": Mapping[str, str],
        "figure": str,
        "headlines": Mapping[str, Text],
    },
    total=False,
)
"""The keys of a claim in an experiment's file, or of a part of one; experiments/README.md describes them."""
KEYS = get_type_hints(Keys, include_extras=True)
SIDE = ("arm", "condition", "conditions", "level", "levels")
SEEN = (*SIDE, "test", "expect", "metric", "measure", "above", "below")


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
    """A test of each run (analysis.run_tests) holds, or with `expect` false does not. share: how many of the runs the
    claim is about at least, as a share: half of them, unless it says that some do."""

    test: str
    expect: bool
    share: float = MOST


@dataclass(frozen=True)
class Ranged:
    """A quantity, or its paired difference (or ratio) to a baseline, lies between `above` and `below`; None: no
    limit."""

    quantity: Quantity
    above: float | None
    below: float | None
    baseline: Side | None
    ratio: bool


@dataclass(frozen=True)
class Compared:
    """A quantity is lower or higher than the baseline's, by `at_least` so much (a factor for a ratio), or equal.

    margin: how far apart two means may be that are equal: nats, or the natural logarithm of a ratio; NaN where the
    quantity has none.
    """

    quantity: Quantity
    expect: str
    at_least: float
    margin: float
    baseline: Side
    ratio: bool


@dataclass(frozen=True)
class Seen:
    """Something that runs must have shown: a test that holds (`expect`), or a quantity of each run within limits."""

    side: Side
    test: str = ""
    expect: bool = True
    quantity: Quantity | None = None
    above: float = -math.inf
    below: float = math.inf

    def __str__(self) -> str:
        if self.test:
            return f"{self.side.arm} {'' if self.expect else 'not '}{self.test}"
        limits = [f"above {self.above:g}"] if self.above > -math.inf else []
        limits += [f"below {self.below:g}"] if self.below < math.inf else []
        return f"{self.side.arm}'s {self.quantity} {' and '.join(limits)}"


@dataclass(frozen=True)
class Claim:
    """claim, source: sentences. asked: how it is judged.

    control: what a remedy is a remedy against; the claim is judged on the seeds whose control showed it, and on no
    others. precondition: what its mechanism needs; where the judged runs did not show it, they contradict nothing.
    not_testable: why these runs cannot answer, said in advance. contradicts: the disagreement between papers that it
    is about; sides: by answer, whose side the evidence is on. headlines: by answer, what it says in a sentence, for the
    top of the page. figure: the one that shows it; "": whichever draws its
    runs.
    """

    claim: str
    source: str
    side: Side
    asked: Tested | Ranged | Compared
    control: Seen | None = None
    precondition: Seen | None = None
    not_testable: str = ""
    contradicts: str = ""
    sides: Mapping[str, str] = field(default_factory=dict)
    figure: str = ""
    headlines: Mapping[str, str] = field(default_factory=dict)

    @property
    def arms(self) -> set[str]:
        """The arms that it rests on."""
        baseline = None if isinstance(self.asked, Tested) else self.asked.baseline
        return {self.side.arm} | ({baseline.arm} if baseline else set())

    @property
    def own(self) -> bool:
        """Whether it is muonlab's own, from earlier runs, and not a paper's."""
        return self.source.startswith(OWN)

    def about(self, what: str) -> "Claim":
        """The same claim, and its headlines, with what it is about in parentheses."""
        headlines = {answer: f"{sentence} ({what})" for answer, sentence in self.headlines.items()}
        return replace(self, claim=f"{self.claim} ({what})", headlines=headlines)


def read_claim(
    values: Mapping[str, object], conditions: Mapping[str, Collection[str]], searched: Collection[str] = ()
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
        if answer not in SETTLED:
            raise unknown_name(f"answer that names a side in `sides` of '{name}'", answer, SETTLED)
    for answer in given.get("headlines", ()):
        if answer not in ANSWERS:
            raise unknown_name(f"answer in `headlines` of '{name}'", answer, ANSWERS)
    control, precondition = (
        _seen(role, seen, side, conditions, name) if seen is not None else None
        for role, seen in (("control", given.get("control")), ("precondition", given.get("precondition")))
    )
    if isinstance(asked, Tested) and not asked.expect and "control" not in given:
        raise MuonlabError(
            f"the claim '{name}' says that something is absent; it needs a `control`, runs that would show it"
        )
    return Claim(
        claim=name,
        source=given["source"],
        side=side,
        asked=asked,
        control=control,
        precondition=precondition,
        not_testable=given.get("not_testable", ""),
        contradicts=given.get("contradicts", ""),
        sides=given.get("sides", {}),
        figure=given.get("figure", ""),
        headlines=given.get("headlines", {}),
    )


def _checked(values: Mapping[str, object], keys: Collection[str], name: str) -> Keys:
    for key in values:
        if key not in keys:
            raise unknown_name(f"key of the claim '{name}'", str(key), keys)
    checked = {
        key: check(KEYS[key], value, f"`{key}` of the claim '{name}'") for key, value in values.items()
    }
    return cast(Keys, checked)


def _side(given: Keys) -> Side:
    conditions = given["conditions"] if "conditions" in given else [given["condition"]]
    levels = given["levels"] if "levels" in given else [given["level"]] if "level" in given else []
    return Side(given["arm"], tuple(conditions), tuple(levels))


def _baseline(values: str | Mapping[str, object], side: Side, name: str) -> Side:
    """The claim's own side but for what the baseline says."""
    own = _checked({"arm": values} if isinstance(values, str) else values, SIDE, name)
    complete: Keys = {"arm": side.arm, **own}
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


def _seen(
    role: str, values: Mapping[str, object], side: Side, conditions: Mapping[str, Collection[str]], claim: str
) -> Seen:
    name = f"{role} of '{claim}'"
    own = _checked(values, SEEN, name)
    where = _baseline({key: values[key] for key in SIDE if key in values}, side, name)
    _check_side(where, conditions, claim, role)
    if len({"test", "metric", "measure"} & set(own)) != 1:
        raise MuonlabError(
            f"the {name} names a `test`, or a `metric` or `measure` of each run with `above` or `below`"
        )
    if "test" in own:
        if own["test"] not in RUN_TESTS:
            raise unknown_name(f"test in the {name}", own["test"], RUN_TESTS)
        holds = check(bool, own.get("expect", True), f"`expect` of the claim '{name}'")
        return Seen(where, own["test"], holds)
    quantity = _quantity_seen(own, name)
    if not {"above", "below"} & set(own):
        raise MuonlabError(f"the {name} has a quantity and needs `above` or `below`")
    above, below = own.get("above", -math.inf), own.get("below", math.inf)
    return Seen(where, quantity=quantity, above=above, below=below)


def _quantity_seen(own: Keys, name: str) -> Quantity:
    if "measure" in own:
        return read_quantity(own["measure"], ("run",))
    if own["metric"] not in METRICS:
        raise unknown_name(f"metric in the {name}", own["metric"], METRICS)
    return Quantity(own["metric"])


def _asked(given: Keys, side: Side, name: str) -> Tested | Ranged | Compared:
    if "test" in given:
        if given["test"] not in RUN_TESTS:
            raise unknown_name(f"test of '{name}'", given["test"], RUN_TESTS)
        holds = given.get("expect")
        if not isinstance(holds, bool):
            raise MuonlabError(
                f"the claim '{name}' is about a test of each run, so `expect` is true or false"
            )
        return Tested(given["test"], holds, given.get("share", MOST))
    if "harmless" in given:
        given = {**given, "metric": "loss", "baseline": given["harmless"], "expect": "equal"}
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
    # A quantity that is a factor itself is compared by its ratio too.
    ratio = "as" in given or (quantity.unit == "x" and baseline is not None and quantity.kind != "pair")
    if "expect" not in given:
        return Ranged(quantity, given.get("above"), given.get("below"), baseline, ratio)
    expect = str(given["expect"])
    if expect not in DIRECTIONS:
        raise unknown_name(f"`expect` of '{name}'", expect, DIRECTIONS)
    if baseline is None:
        raise MuonlabError(f"the claim '{name}' expects '{expect}' but names no `baseline`")
    margin = given.get("margin", _usual_margin(quantity, ratio))
    if expect == "equal" and math.isnan(margin):
        raise MuonlabError(f"the claim '{name}' expects equality of {quantity}, so it needs a `margin`")
    at_least = given.get("at_least", 1.0 if ratio else 0.0)
    if ratio:
        margin, at_least = math.log(margin), math.log(at_least)
    return Compared(quantity, expect, at_least, margin, baseline, ratio)


def _usual_margin(quantity: Quantity, ratio: bool) -> float:
    if ratio:
        return LOGIT_MARGIN if "logit" in str(quantity) else math.nan
    return LOSS_MARGIN if quantity.unit == "nats" else math.nan
