"""Whether a saved state fits an optimizer: all of it is checked before any of it is taken.

torch itself casts and copies any state, and its fused AdamW writes as many numbers as the parameter has into a buffer
of any size.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from numbers import Real
from typing import Any

from torch import Tensor

from muonlab.errors import MuonlabError

Shapes = Mapping[str, tuple[int, ...] | None]


def describe(value: Any) -> str:
    """A value of a saved state in words: "a float32 tensor of shape (2, 3)", "a list"."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def check_entries(what: str, state: Any, entries: Iterable[str]) -> None:
    """Raise MuonlabError unless `state` is a mapping that has all these entries; `what` begins the sentence."""
    if not isinstance(state, Mapping):
        raise MuonlabError(f"{what} is {describe(state)}; expected a dict")
    missing = [name for name in entries if name not in state]
    if missing:
        raise MuonlabError(
            f"{what} has no {' and no '.join(missing)}; it is incomplete, or not a state saved by muonlab"
        )


def check_top(state: Any) -> None:
    """Raise MuonlabError unless `state` is a dict with a step count, parameter groups and their states."""
    check_entries("the saved optimizer state", state, ("state", "param_groups", "steps_done"))
    steps = state["steps_done"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise MuonlabError(
            f"steps_done of the saved state must be a number of steps of at least 0, not {steps!r}"
        )
    for name, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state[name], kind):
            raise MuonlabError(
                f"'{name}' of the saved state is {describe(state[name])}; expected a {kind.__name__}"
            )


def check_groups(
    ours: list[dict[str, Any]], saved: list[Any], settings_of: Mapping[str, Iterable[str]]
) -> None:
    """Raise MuonlabError unless the saved groups hold the same parameters under the same rules.

    settings_of: per rule the settings that each of its groups must have.
    """
    if len(ours) != len(saved):
        raise MuonlabError(f"the saved state has {len(saved)} parameter groups, this optimizer {len(ours)}")
    for here, there in zip(ours, saved, strict=True):
        label = f"parameter group '{here['name']}'"
        if isinstance(there, Mapping) and there.get("rule") != here["rule"]:
            raise MuonlabError(f"{label} is under {here['rule']}, but was saved under {there.get('rule')}")
        entries = ("params", "name", "peak_lr", *settings_of[here["rule"]])
        check_entries(f"{label} of the saved state", there, entries)
        if not isinstance(there["params"], list) or not all(isinstance(key, int) for key in there["params"]):
            raise MuonlabError(
                f"params of {label} were saved as {there['params']!r}; expected a list of numbers"
            )
        names = here.get("param_names"), there.get("param_names")
        if len(there["params"]) != len(here["params"]) or (all(names) and names[0] != names[1]):
            raise MuonlabError(f"{label} does not hold the parameters that were saved")
    keys = list(chain.from_iterable(there["params"] for there in saved))
    if len(set(keys)) < len(keys):
        raise MuonlabError("two parameters of the saved state have the same key")


def check_buffers(name: str, state: Any, shapes: Shapes, required: Iterable[str]) -> None:
    """Raise MuonlabError unless a parameter's saved state has the required entries and each has its shape.

    name: the parameter's. shapes: of every tensor that the state may hold; None means a plain number.
    """
    what = f"the saved state of {name}"
    check_entries(what, state, required)
    for entry, value in state.items():
        if entry not in shapes:
            raise MuonlabError(f"{what} has an unknown entry '{entry}'; allowed: {', '.join(shapes)}")
        shape = shapes[entry]
        if shape is None and isinstance(value, Real):
            continue
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.shape == (shape or ())
        if not fits:
            raise MuonlabError(
                f"{entry} of {name} was saved as {describe(value)}; expected a floating-point tensor of shape "
                f"{shape or ()}"
            )
