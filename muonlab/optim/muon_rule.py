"""The Muon rule: momentum, orthogonalisation, scale, decay. What the settings mean stands at `Muon`."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from muonlab.errors import MuonlabError
from muonlab.optim.checks import check_choice, check_flag, check_number
from muonlab.optim.matrix_view import MatrixView
from muonlab.optim.momentum import MOMENTUM_KINDS, momentum_directions
from muonlab.optim.newton_schulz import orthogonalise
from muonlab.optim.normuon import equilibrate_rows, normalise_neurons, renormalise, second_moment_like
from muonlab.optim.scale_rules import SCALE_RULES, scale_factor
from muonlab.optim.schedules import resolve_schedule
from muonlab.optim.weight_decay import WEIGHT_DECAY_KINDS, decay, decay_share

WORK_DTYPES = ("float64", "float32", "bfloat16", "float16")


def prepare(group: dict[str, Any]) -> None:
    """Check the settings of one parameter group and make them plain values; raises MuonlabError."""
    for name in ("lr", "weight_decay"):
        check_number(f"{name} of a muon group", group[name])
    check_number("momentum", group["momentum"], below=1.0)
    for name in ("nesterov", "cautious", "equilibrate_rows", "renormalise"):
        check_flag(name, group[name])
    check_choice("momentum kind", group["momentum_kind"], MOMENTUM_KINDS)
    check_choice("scale rule", group["scale_rule"], SCALE_RULES)
    check_choice("weight decay kind", group["weight_decay_kind"], WEIGHT_DECAY_KINDS)
    if group["normuon_beta2"] is not None:
        check_number("normuon_beta2", group["normuon_beta2"], below=1.0)
    if group["ns_dtype"] is not None:
        check_choice("ns_dtype", group["ns_dtype"], WORK_DTYPES)
    # Names and numbers only, so that a checkpoint loads with weights_only=True.
    if not isinstance(group["ns_schedule"], str):
        group["ns_schedule"] = resolve_schedule(group["ns_schedule"]).rows
    resolve_schedule(group["ns_schedule"], group["ns_steps"])
    if isinstance(group["row_blocks"], list):
        group["row_blocks"] = tuple(group["row_blocks"])
    view_of_group(group)
    if group["weight_decay_kind"] == "shape_scaled" and isinstance(group["row_blocks"], tuple):
        raise MuonlabError(
            "shape_scaled weight decay needs one shape per parameter; row_blocks has unequal blocks"
        )


def view_of_group(group: dict[str, Any]) -> MatrixView:
    """How the parameters of this group are seen as matrices."""
    return MatrixView(group["row_blocks"], group["col_blocks"], group["flatten"])


def check_parameter(param: Tensor, name: str, group: dict[str, Any]) -> None:
    """Raise MuonlabError if the parameter has no matrix view or is not real."""
    if not param.is_floating_point():
        raise MuonlabError(f"{name} is {param.dtype}; Muon orthogonalises real floating-point matrices only")
    view_of_group(group).check(param.shape, name)


def view_of(shape: torch.Size, group: dict[str, Any]) -> str:
    """The matrix view in words, for the routing table."""
    return view_of_group(group).describe(shape)


def init_state(param: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """A zero momentum buffer of the parameter's shape."""
    return {"momentum_buffer": torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)}


def update(
    params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    """One Muon step, in place, for parameters of one device and dtype whose groups differ in their views only.

    Matrices of one shape, also transposed, go through together; what one shape class needs is freed before the
    next, so the extra memory is that of the largest class.
    """
    views = [view_of_group(group) for group in groups]
    classes: dict[frozenset[int], list[int]] = defaultdict(list)
    for i, (param, view) in enumerate(zip(params, views, strict=True)):
        classes[frozenset(n for shape in view.block_shapes(param.shape) for n in shape[-2:])].append(i)
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
    group: dict[str, Any],
) -> None:
    lr, steps = group["lr"], group["ns_steps"]
    directions = momentum_directions(
        grads, states, group["momentum_kind"], group["momentum"], group["nesterov"]
    )
    blocks = [view.split(direction) for view, direction in zip(views, directions, strict=True)]
    owners = [(i, j) for i, own in enumerate(blocks) for j in range(len(own))]
    stacks = [stack for own in blocks for stack in own]
    if group["equilibrate_rows"]:
        stacks = [equilibrate_rows(stack) for stack in stacks]
    dtype = None if group["ns_dtype"] is None else getattr(torch, group["ns_dtype"])
    updates = orthogonalise(stacks, group["ns_schedule"], steps, dtype)
    if group["renormalise"]:
        updates = [renormalise(stack) for stack in updates]
    if group["normuon_beta2"] is not None:
        for n, (i, j) in enumerate(owners):
            moment = states[i].setdefault(f"second_moment_{j}", None)
            if moment is None:
                moment = states[i][f"second_moment_{j}"] = second_moment_like(updates[n])
            updates[n] = normalise_neurons(updates[n], moment, group["normuon_beta2"])

    scales = [scale_factor(group["scale_rule"], *stack.shape[-2:]) for stack in updates]
    updates = torch._foreach_mul(updates, scales)  # O <- scale(rows, cols) O
    joined = iter(updates)
    whole = [
        view.join([next(joined) for _ in own], param.shape)
        for view, own, param in zip(views, blocks, params, strict=True)
    ]
    if group["weight_decay"]:
        first = [n for n, (_, j) in enumerate(owners) if j == 0]
        shares = [
            decay_share(group["weight_decay_kind"], group["weight_decay"], lr, group["peak_lr"], scales[n])
            for n in first
        ]
        decay(params, whole, shares, group["cautious"])
    # W <- W - lr O
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(whole, lr))
    else:
        torch._foreach_add_(params, whole, alpha=-lr)
