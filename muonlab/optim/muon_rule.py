"""The Muon rule: momentum, orthogonalisation, scale, decay. The settings are explained at `Muon`."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.backend import FORMS
from muonlab.optim.checks import check_choice, check_flag, check_number, plain_value
from muonlab.optim.matrix_view import MatrixView
from muonlab.optim.momentum import MOMENTUM_KINDS, momentum_directions
from muonlab.optim.newton_schulz import WORK_DTYPES, orthogonalise
from muonlab.optim.normuon import equilibrate_rows, normalise_neurons, renormalise, second_moment_shape
from muonlab.optim.scale_rules import SCALE_RULES
from muonlab.optim.schedules import SCHEDULES, Coefficients, Row, Schedule, resolve_schedule
from muonlab.optim.weight_decay import WEIGHT_DECAY_KINDS, decay, decay_share

NS_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in WORK_DTYPES)
# What the state of every updated parameter holds.
REQUIRED_STATE = ("momentum_buffer",)


def prepare(group: dict[str, Any]) -> None:
    """Check the settings of one parameter group, plain values (`plain_value`); raises MuonlabError.

    `ns_schedule` and `ns_dtype` become names and numbers, so that a checkpoint loads with weights_only=True.
    """
    for name in ("lr", "weight_decay"):
        check_number(f"{name} of a muon group", group[name])
    check_number("momentum", group["momentum"], below=1.0)
    for name in ("nesterov", "cautious", "flatten", "equilibrate_rows", "renormalise"):
        check_flag(name, group[name])
    check_choice("momentum kind", group["momentum_kind"], MOMENTUM_KINDS)
    check_choice("scale rule", group["scale_rule"], SCALE_RULES)
    check_choice("weight decay kind", group["weight_decay_kind"], WEIGHT_DECAY_KINDS)
    if group["normuon_beta2"] is not None:
        check_number("normuon_beta2", group["normuon_beta2"], below=1.0)
    if isinstance(group["ns_dtype"], torch.dtype):
        group["ns_dtype"] = str(group["ns_dtype"]).removeprefix("torch.")
    if group["ns_dtype"] is not None:
        check_choice("ns_dtype", group["ns_dtype"], NS_DTYPES)
    group["ns_schedule"] = plain_value(_plain_schedule(group["ns_schedule"]))
    resolve_schedule(group["ns_schedule"], group["ns_steps"])
    check_choice("ns_backend", group["ns_backend"], ("auto", *FORMS))
    view = _view(group)
    if group["weight_decay_kind"] == "shape_scaled" and isinstance(view.row_blocks, tuple):
        raise MuonlabError(
            "shape_scaled weight decay needs blocks of one shape; row_blocks has sizes of its own"
        )


def check_parameter(param: Tensor, name: str, group: dict[str, Any]) -> None:
    """Raise MuonlabError if the parameter has no such view as matrices, or only a shard of them is here."""
    if hasattr(param, "placements"):
        raise MuonlabError(
            f"{name} is sharded (DTensor); Muon needs whole matrices on every rank, as under DDP"
        )
    _view(group).check(param.shape, name)


def describe_view(shape: torch.Size, group: dict[str, Any]) -> str:
    """The matrices in words, for the routing table."""
    return _view(group).describe(shape)


def state_shapes(shape: torch.Size, group: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """The shapes of all that a parameter's state may hold; None for a number."""
    blocks = _view(group).block_shapes(shape)
    moments = {f"second_moment_{i}": second_moment_shape(block) for i, block in enumerate(blocks)}
    return {"momentum_buffer": tuple(shape), "momentum_product": None, **moments}


def init_state(param: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """A zero momentum buffer of the parameter's shape."""
    return {"momentum_buffer": torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)}


def update(
    params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    """One step, in place, for parameters of one device and dtype whose groups differ in their views only.

    Matrices of one shape, or of one and its transpose, go through together. What a class of shapes needs is
    freed before the next begins, so the extra memory is that of the largest class.
    """
    view_of = {id(group): _view(group) for group in groups}
    views = [view_of[id(group)] for group in groups]
    classes: dict[frozenset, list[int]] = defaultdict(list)
    for i, (param, view) in enumerate(zip(params, views, strict=True)):
        shapes = frozenset(frozenset(block[-2:]) for block in view.block_shapes(param.shape))
        classes[shapes].append(i)
    for members in classes.values():
        _update_class(
            [params[i] for i in members],
            [grads[i] for i in members],
            [states[i] for i in members],
            [views[i] for i in members],
            groups[0],
        )


def _update_class(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    views: list[MatrixView],
    settings: dict[str, Any],
) -> None:
    # M <- average of gradients; D <- M or its look-ahead
    directions = momentum_directions(
        grads, states, settings["momentum_kind"], settings["momentum"], settings["nesterov"]
    )
    blocks = [view.split(direction) for view, direction in zip(views, directions, strict=True)]
    owners = [(i, f"second_moment_{j}") for i, own in enumerate(blocks) for j in range(len(own))]

    # O <- scale(rows, cols) * NewtonSchulz(D)
    stacks = [stack for own in blocks for stack in own]
    if settings["equilibrate_rows"]:
        stacks = [equilibrate_rows(stack) for stack in stacks]
    dtype = None if settings["ns_dtype"] is None else getattr(torch, settings["ns_dtype"])
    # Nesterov's look-ahead is a fresh tensor and may be written over; without it the direction is the buffer itself.
    out = stacks if settings["nesterov"] else None
    stacks = orthogonalise(
        stacks, settings["ns_schedule"], settings["ns_steps"], dtype, settings["ns_backend"], out=out
    )
    if settings["renormalise"]:
        stacks = [renormalise(stack) for stack in stacks]
    if settings["normuon_beta2"] is not None:
        stacks = [
            _normalise(stack, states[i], name, settings["normuon_beta2"])
            for stack, (i, name) in zip(stacks, owners, strict=True)
        ]
    scales = [SCALE_RULES[settings["scale_rule"]](*stack.shape[-2:]) for stack in stacks]
    length = settings["lr"]
    if len(set(scales)) == 1:  # one factor for all goes into the length, not into every entry
        length = length * scales[0]
    else:
        torch._foreach_mul_(stacks, scales)
    rest = iter(stacks)
    updates = [
        view.join([next(rest) for _ in own], param.shape)
        for view, own, param in zip(views, blocks, params, strict=True)
    ]

    # W <- (1 - share) W - lr O
    if settings["weight_decay"]:
        scale_of = {i: scale for (i, _), scale in zip(owners, scales, strict=True)}
        kind, strength = settings["weight_decay_kind"], settings["weight_decay"]
        shares = [
            decay_share(kind, strength, settings["lr"], settings["peak_lr"], scale_of[i])
            for i in range(len(params))
        ]
        decay(params, updates, shares, settings["cautious"])
    if isinstance(length, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(updates, length))
    else:
        torch._foreach_add_(params, updates, alpha=-length)


def _normalise(update: Tensor, state: dict[str, Any], name: str, beta2: float) -> Tensor:
    """NorMuon's step, with its second moment kept under `name`."""
    if name not in state:
        state[name] = update.new_zeros(second_moment_shape(update.shape))
    return normalise_neurons(update, state[name], beta2)


def _plain_schedule(schedule: Coefficients) -> str | tuple[Row, ...]:
    """The name of a schedule, or its rows with the margin in the first: p(x / s) has a/s, b/s³, c/s⁵."""
    if isinstance(schedule, str):
        return schedule
    if isinstance(schedule, Schedule) and (schedule.exact or SCHEDULES.get(schedule.name) == schedule):
        return schedule.name
    known = resolve_schedule(schedule)
    if known.row_rescaling:
        raise MuonlabError("a schedule with row rescaling is given to an optimizer by its name")
    (a, b, c), *rest = known.rows
    s = known.margin
    return ((a / s, b / s**3, c / s**5), *rest)


def _view(group: dict[str, Any]) -> MatrixView:
    """How the parameters of this group are seen as matrices."""
    return MatrixView(group["row_blocks"], group["col_blocks"], group["flatten"])
