"""Whether a saved state fits an optimizer: all of it is checked before any of it is taken.

torch itself casts and copies any state, and its fused AdamW writes as many numbers as the parameter has into a buffer
of any size.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from itertools import chain
from numbers import Real

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.matrix_view import Group, State
from muonlab.optim.ranks import spread_like
from muonlab.optim.rules import RULES, Rule, parameter_names, prepare_group

Shapes = Mapping[str, tuple[int, ...] | None]
# What averages over the weights keep of a parameter under any rule (muonlab.optim.weight_averages).
MOVES = "lookahead_average"  # the average change of the weights
LENGTH = "lookahead_length"  # how far ahead of the weights the parameter is, in such changes
TAIL = "tail_average"


def describe(value: object) -> str:
    """A value of a saved state in words: "a float32 tensor of shape (2, 3)", "a list"."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def check_entries(what: str, state: object, entries: Iterable[str]) -> None:
    """Raise MuonlabError unless `state` is a mapping that has all these entries; `what` begins the sentence."""
    if not isinstance(state, Mapping):
        raise MuonlabError(f"{what} is {describe(state)}; expected a dict")
    missing = [name for name in entries if name not in state]
    if missing:
        raise MuonlabError(
            f"{what} has no {' and no '.join(missing)}; it is incomplete, or not a state saved by muonlab"
        )


def check_tensor(what: str, saved: object, present: Tensor) -> None:
    """Raise MuonlabError unless `saved` is a tensor of the shape of `present`; `what` begins the sentence."""
    if not isinstance(saved, Tensor) or saved.shape != present.shape:
        raise MuonlabError(f"{what} is {describe(saved)}; expected a tensor of shape {tuple(present.shape)}")


def checked_state(state: State, groups: Sequence[Group], settings_of: Mapping[str, Iterable[str]]) -> State:
    """The saved state of an optimizer with these groups, with plain settings; raises MuonlabError for one that does not
    fit, and changes nothing. settings_of: by rule, the settings that each of its groups must have."""
    check_top(state)
    check_groups(groups, state["param_groups"], settings_of)
    buffers, saved_groups = dict(state["state"]), []
    for here, there in zip(groups, state["param_groups"], strict=True):
        rule, saved = RULES[here["rule"]], dict(there)
        prepare_group(here["rule"], saved)
        for param, key, name in zip(here["params"], saved["params"], parameter_names(here), strict=True):
            rule.check_parameter(param, name, saved)
            if entries := buffers.pop(key, {}):
                shape = tuple(param.shape)
                shapes = {**rule.state_shapes(param.shape, saved), MOVES: shape, LENGTH: (), TAIL: shape}
                check_buffers(name, entries, shapes, rule.required_state())
        saved_groups.append(saved)
    if buffers:
        raise MuonlabError(f"the saved state has parameters that no group holds: {list(buffers)[:3]}")
    return {**state, "param_groups": saved_groups}


def restore_buffers(state: State, groups: Sequence[Group], states: MutableMapping[Tensor, State]) -> None:
    """Put the saved buffers of every parameter into `states`; torch's own would round them to the parameter's dtype."""
    keys = chain.from_iterable(group["params"] for group in state["param_groups"])
    params = [(param, group["rule"]) for group in groups for param in group["params"]]
    for key, (param, rule) in zip(keys, params, strict=True):
        if entries := state["state"].get(key):
            states[param] = moved(entries, param, RULES[rule])


def moved(state: State, param: Tensor, rule: Rule) -> State:
    """A copy of a parameter's state where the parameter is, in `state_dtype`.

    A single number, such as a count of steps, keeps its dtype.
    """
    copied = {
        name: value.to(param.device, value.dtype if value.ndim == 0 else state_dtype(param), copy=True)
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }
    return copied | {
        name: spread_like(param, copied[name]) for name in (*rule.buffers, MOVES, TAIL) if name in copied
    }


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's buffers and of its update: its own, but at least fp32."""
    return torch.promote_types(param.dtype, torch.float32)


def check_top(state: State) -> None:
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
    ours: Sequence[Group], saved: Sequence[Group], settings_of: Mapping[str, Iterable[str]]
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
        entries = ("params", "name", *(("peak_lr",) if "lr" in here else ()), *settings_of[here["rule"]])
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


def check_buffers(name: str, state: State, shapes: Shapes, required: Iterable[str]) -> None:
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
