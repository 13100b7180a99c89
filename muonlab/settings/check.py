"""Check a user's settings: types and ranges come from annotations, and a mistake is reported in one sentence.

A section is a dataclass, which `build` makes from plain values, or the keyword parameters of a user's builder, which
`settings_class` turns into such a dataclass. Ranges are written as `Annotated[float, Ge(0)]` or by the names
below, choices as `Literal`. Nothing here imports torch, so a mistake is reported in a fraction of a second.
"""

import functools
import inspect
import operator
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ConfigDict, Strict, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypeForm

from muonlab.errors import MuonlabError, shown, unknown_name

Count = Annotated[int, Ge(1)]  # at least one
Steps = Annotated[int, Ge(0)]  # a number of steps; the meaning of 0 is documented where it is used
Seed = Annotated[int, Ge(0), Lt(1 << 63)]
Text = Annotated[str, MinLen(1)]
# The name of a folder inside another, also used in databases: not "../x", "a/b", "." or 300 letters.
Name = Annotated[str, StringConstraints(pattern=r"^\w[\w ,.+=@-]{0,59}$")]
PathText = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$")]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
Average = Annotated[float, Ge(0), Lt(1)]  # the weight of the past in a running average

Section = TypeVar("Section")
Checked = TypeVar("Checked")
_BOUNDS = {
    Ge: ("ge", "at least"),
    Gt: ("gt", "above"),
    Le: ("le", "at most"),
    Lt: ("lt", "below"),
}
_PATTERNS = {
    get_args(Name)[1]: "a name of up to 60 letters, digits, spaces and ,.+=@_- (a letter or digit first)",
    get_args(PathText)[1]: "the path of a file or folder",
}
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_DIGITS = r"\d(?:_?\d)*"
_NUMBER = re.compile(
    rf"(?:^|[\[({{,:])\s*([-+]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?{_DIGITS})?)\s*(?=$|[\])}},])"
)
_UNSEEN = 1 << 60  # a limit this large only keeps a number within its format and is not mentioned


class Named(Protocol):
    """The checked settings of a model, optimizer, schedule or corpus, built in or a user's own."""

    @property
    def name(self) -> str:
        """The registry's name for what they configure."""

    def __hash__(self) -> int: ...


class NamedModel(Named, Protocol):
    """The checked settings of a model."""

    @property
    def context(self) -> int:
        """Longest sequence, in tokens."""


def vanishing_number(text: str) -> str:
    """The first number of a text in Hydra's or YAML's syntax, alone or in lists, that is too small for a float, such as
    1e-400, and would silently become 0; "" if there is none. Quoted texts hold no numbers."""
    numbers = _NUMBER.findall(_QUOTED.sub("''", text))
    return next((number for number in numbers if float(number) == 0.0 != Decimal(number)), "")


def build(section: type[Section], values: Mapping[str, object], where: str) -> Section:
    """An instance of the dataclass `section` from plain values; `where` names it in errors ("optimizer").

    Whole numbers are accepted as numbers, lists as tuples and mappings as dataclasses; true and text are not numbers,
    and NaN and infinities are refused. Raises MuonlabError in one sentence for an unknown or missing name and for a
    value of a wrong type, range or shape, and whatever `__post_init__` raises.
    """
    hints = annotations(section)  # type: ignore[arg-type]  # a class is hashable
    known = {f.name: f for f in fields(section) if f.init}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise unknown_name(f"{where} setting".strip(), str(name), known)
    checked = {}
    for name, spec in known.items():
        place = f"{where}.{name}" if where else name
        if name in values:
            checked[name] = check(hints[name], values[name], place)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise MuonlabError(f"{place} is missing; it must be {describe(hints[name])}")
    return section(**checked)


def check(annotation: TypeForm[Checked], value: object, place: str) -> Checked:
    """`value` as the type `annotation`. Raises MuonlabError with what was given and what is allowed."""
    kind, *bounds = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
    if isinstance(kind, type) and is_dataclass(kind):
        if isinstance(value, kind):
            return value  # type: ignore[return-value]  # of the annotation's own type
        if isinstance(value, Mapping):
            return build(kind, value, place)  # type: ignore[return-value]  # an instance of the annotation
        raise MuonlabError(f"{place} must be {describe(annotation)}, not {shown(value)}")
    if get_origin(kind) is Mapping and isinstance(value, Mapping):
        if not value and any(isinstance(bound, MinLen) for bound in bounds):
            raise MuonlabError(f"{place} must not be empty")
        entries = get_args(kind)[1]
        checked = {str(name): check(entries, entry, f"{place}.{name}") for name, entry in value.items()}
        return checked  # type: ignore[return-value]  # a mapping, as the annotation says
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError:
        choices = _choices(annotation)
        if isinstance(value, str) and choices:
            raise unknown_name(place, value, choices) from None
        raise MuonlabError(
            f"{place} must be {describe(annotation)}, not {shown(value)}{_hint(annotation, value)}"
        ) from None


class Keywords:
    """Base of the classes that `settings_class` makes: settings that are passed on as keywords."""

    name: str

    def arguments(self) -> dict[str, object]:
        """The builder's keyword arguments."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "name"}  # type: ignore[arg-type]


def settings_class(builder: Callable[..., object], name: str) -> type:
    """The dataclass of a builder's settings.

    It is the annotation of the builder's parameter `settings`, or else is made from its keyword parameters that have a
    default or follow `*`, plus a field `name`. Raises MuonlabError for a builder that takes **settings, since their
    names cannot be checked.
    """
    # A class' own hints are those of its attributes, and may be its parent's.
    call = builder.__init__ if inspect.isclass(builder) else builder
    try:
        hints = get_type_hints(call, include_extras=True)
    except NameError as error:
        raise MuonlabError(
            f"a setting of {_name(builder)} is annotated with an unknown name: {error}"
        ) from error
    if is_dataclass(hints.get("settings")):
        return hints["settings"]
    entries: list[Any] = [("name", str, field(default=name))]
    for parameter in inspect.signature(builder).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            raise MuonlabError(
                f"{_name(builder)} takes **{parameter.name}, so its settings cannot be checked; name each of them"
            )
        if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        default = parameter.default
        annotation = hints.get(parameter.name, type(default) if _plain(default) else Any)
        if default is parameter.empty:
            entries.append((parameter.name, annotation))
        else:
            entries.append((parameter.name, annotation, field(default_factory=_giving(default))))
    return make_dataclass(f"{_name(builder)}_settings", entries, bases=(Keywords,), kw_only=True, frozen=True)


def defaults(section: type) -> dict[str, object]:
    """{name: default} of the settings of a section that have a default."""
    values = {}
    for spec in fields(section):
        if spec.default is not MISSING:
            values[spec.name] = spec.default
        elif spec.default_factory is not MISSING:
            values[spec.name] = spec.default_factory()
    return values


def describe(annotation: TypeForm[object]) -> str:
    """The values that an annotation allows, in words that fit after "must be"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe_range(arguments[0], arguments[1:])
    if annotation in (int, float):
        return _describe_range(annotation, ())
    if origin is Literal:
        return " or ".join(repr(choice) if isinstance(choice, str) else shown(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in arguments)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        alike = len(set(arguments)) == 1
        entries = f"each {describe(arguments[0])}" if alike else ", then ".join(map(describe, arguments))
        return f"a list of {len(arguments)} entries, {entries}"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return f"a mapping of names to values, each {describe(arguments[1])}"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"a list, each entry {describe(arguments[0])}"
    if is_dataclass(annotation):
        return f"a mapping with {', '.join(f.name for f in fields(annotation))}"
    words: dict[object, str] = {
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
        Any: "anything",
        object: "anything",
    }
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _describe_range(kind: Any, bounds: tuple[Any, ...]) -> str:
    if any(isinstance(bound, MinLen) for bound in bounds):
        return f"{describe(kind)}, not empty"
    if bounds and isinstance(bounds[0], StringConstraints):
        return _PATTERNS[bounds[0]]
    if kind not in (int, float):
        return describe(kind)
    limits = []
    for bound in bounds:
        if type(bound) in _BOUNDS:
            attribute, words = _BOUNDS[type(bound)]
            if abs(limit := getattr(bound, attribute)) < _UNSEEN:
                large = isinstance(limit, int) and abs(limit) > 9999
                limits.append(f"{words} {limit:,}" if large else f"{words} {limit:g}")
    if not limits:
        return "a whole number" if kind is int else "a number"
    open_above = not any(isinstance(bound, Le | Lt) for bound in bounds)
    noun = "a whole number" if kind is int else "a finite number" if open_above else "a number"
    return f"{noun} {'of ' if limits[0].startswith('at ') else ''}{' and '.join(limits)}"


def _giving(value: object) -> Callable[[], object]:
    return lambda: value


@cache
def annotations(section: type) -> dict[str, Any]:
    """{name: annotation} of the settings of a section."""
    return get_type_hints(section, include_extras=True)


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return _kept_adapter(annotation)
    except TypeError:  # a user's own bounds that cannot be hashed
        return _new_adapter(annotation)


def _new_adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(
        _strict(annotation), config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    )


_kept_adapter = cache(_new_adapter)  # making one takes as long as a dozen checks


def _strict(annotation: Any) -> Any:
    """int, float and str without pydantic's conversions ("4" or true to a number), at any depth."""
    if annotation in (int, float, str):
        return Annotated[annotation, Strict()]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[(_strict(arguments[0]), *arguments[1:])]
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, (_strict(choice) for choice in arguments))
    if origin in (None, Literal) or not arguments:
        return annotation
    return origin[tuple(a if a is Ellipsis else _strict(a) for a in arguments)]


def _choices(annotation: Any) -> list[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [choice for choice in arguments if isinstance(choice, str)]
    if origin in (Union, types.UnionType):
        [first, *others] = [choice for choice in arguments if choice is not types.NoneType]
        return [] if others else _choices(first)
    return _choices(arguments[0]) if origin is Annotated else []


def _hint(annotation: Any, value: object) -> str:
    """A hint on how to write a whole number that was given as 1e5."""
    if not isinstance(value, float) or not value.is_integer() or "whole number" not in describe(annotation):
        return ""
    return f"; a number with a decimal point or an exponent is not a whole number: write {int(value)}"


def _plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str)


def _name(builder: Callable[..., object]) -> str:
    return getattr(builder, "__name__", type(builder).__name__)
