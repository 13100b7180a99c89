"""The Muon rule: momentum, orthogonalisation, scale, decay. The settings are explained at `Muon`."""

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.backend import FORMS
from muonlab.optim.checks import check_choice, check_flag, check_number, plain_value
from muonlab.optim.matrix_view import MatrixView
from muonlab.optim.momentum import MOMENTUM_KINDS, momentum_directions
from muonlab.optim.newton_schulz import WORK_DTYPES, orthogonalise
from muonlab.optim.normuon import equilibrate_rows, normalise_neurons, renormalise, second_moment_shape
from muonlab.optim.ownership import Ranks
from muonlab.optim.scale_rules import SCALE_RULES
from muonlab.optim.schedules import SCHEDULES, Coefficients, Row, Schedule, resolve_schedule
from muonlab.optim.sharded import check_placement, local_part
from muonlab.optim.weight_decay import WEIGHT_DECAY_KINDS, decay, decay_share

if TYPE_CHECKING:  # a torch without distributed has no such class
    from torch.distributed import ProcessGroup

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
    """Raise MuonlabError if the parameter has no such view as matrices, or is spread over ranks in an unknown way."""
    check_placement(param, name)
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
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    groups: list[dict[str, Any]],
    process_group: "ProcessGroup | None",
) -> None:
    """One step, in place, for parameters of one device and dtype whose groups differ in their views only.

    Matrices of one shape, or of one and its transpose, go through together. What a class of shapes needs is
    freed before the next begins, so the extra memory is that of the largest class. Ranks that share the work
    share all classes at once, since a few matrices of one shape could not be dealt out evenly; they keep the
    directions of all, as much memory as the momentum.
    """
    view_of = {id(group): _view(group) for group in groups}
    views = [view_of[id(group)] for group in groups]
    ranks = Ranks.of(params, process_group)
    classes: dict[frozenset, list[int]] = defaultdict(list)
    for i, (param, view) in enumerate(zip(params, views, strict=True)):
        shapes = () if ranks else (frozenset(block[-2:]) for block in view.block_shapes(param.shape))
        classes[frozenset(shapes)].append(i)
    for members in classes.values():
        _update_class(
            [params[i] for i in members],
            [grads[i] for i in members],
            [states[i] for i in members],
            [views[i] for i in members],
            groups[0],
            ranks,
        )


def _update_class(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    views: list[MatrixView],
    settings: dict[str, Any],
    ranks: Ranks | None,
) -> None:
    here = [local_part(param) for param in params]
    # M <- average of gradients; D <- M or its look-ahead
    directions = momentum_directions(
        [local_part(grad) for grad in grads],
        states,
        settings["momentum_kind"],
        settings["momentum"],
        settings["nesterov"],
    )

    # O <- scale(rows, cols) * NewtonSchulz(D)
    scale = SCALE_RULES[settings["scale_rule"]]
    scales = [
        [scale(*block[-2:]) for block in view.block_shapes(param.shape)]
        for param, view in zip(params, views, strict=True)
    ]
    length, common = settings["lr"], {factor for own in scales for factor in own}
    if alike := len(common) == 1:  # one factor for all goes into the length, not into every entry
        length = length * common.pop()
    with_moments = settings["normuon_beta2"] is not None
    if with_moments:
        for param, view, state, direction in zip(params, views, states, directions, strict=True):
            _ensure_moments(state, view, param.shape, direction)

    def transform(stacks: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
        return _transform(stacks, moments, settings, None if alike else scale)

    if ranks is not None:
        shapes = [param.shape for param in params]
        updates = ranks.updates(shapes, directions, views, states, transform, with_moments)
    else:
        blocks = [view.split(direction) for view, direction in zip(views, directions, strict=True)]
        owners = [(i, f"second_moment_{j}") for i, own in enumerate(blocks) for j in range(len(own))]
        moments = [states[i][name] for i, name in owners] if with_moments else []
        rest = iter(transform([stack for own in blocks for stack in own], moments))
        updates = [
            view.join([next(rest) for _ in own], param.shape)
            for view, own, param in zip(views, blocks, params, strict=True)
        ]

    # W <- (1 - share) W - lr O
    if settings["weight_decay"]:
        kind, strength = settings["weight_decay_kind"], settings["weight_decay"]
        # shape_scaled, which alone looks at the scale, has blocks of one shape
        shares = [decay_share(kind, strength, settings["lr"], settings["peak_lr"], own[0]) for own in scales]
        decay(here, updates, shares, settings["cautious"])
    if isinstance(length, Tensor):
        torch._foreach_sub_(here, torch._foreach_mul(updates, length))
    else:
        torch._foreach_add_(here, updates, alpha=-length)


def _transform(
    stacks: list[Tensor],
    moments: list[Tensor],
    settings: dict[str, Any],
    scale: Callable[[int, int], float] | None,
) -> list[Tensor]:
    """The updates of stacks (..., rows, cols) of whole matrices; without a scale they are left to be scaled."""
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
            normalise_neurons(stack, moment, settings["normuon_beta2"])
            for stack, moment in zip(stacks, moments, strict=True)
        ]
    if scale is not None:
        torch._foreach_mul_(stacks, [scale(*stack.shape[-2:]) for stack in stacks])
    return stacks


def _ensure_moments(state: dict[str, Any], view: MatrixView, shape: torch.Size, like: Tensor) -> None:
    """Zero second moments for NorMuon where there are none yet: whole on every rank, since they are small."""
    for j, block in enumerate(view.block_shapes(shape)):
        if f"second_moment_{j}" not in state:
            state[f"second_moment_{j}"] = like.new_zeros(second_moment_shape(block))


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
