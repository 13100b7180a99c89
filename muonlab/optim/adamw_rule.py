"""The AdamW rule, for what is not orthogonalised: PyTorch's own functional AdamW."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from muonlab.errors import MuonlabError
from muonlab.optim.checks import check_number
from muonlab.optim.sharded import local_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FUSED = ("cpu", "cuda")
# What the state of every updated parameter holds.
REQUIRED_STATE = ("exp_avg", "exp_avg_sq", "step")


def prepare(group: dict[str, Any]) -> None:
    """Check the settings of one parameter group, plain values (`plain_value`); raises MuonlabError."""
    for name in ("lr", "eps", "weight_decay"):
        check_number(f"{name} of an adamw group", group[name])
    betas = group["betas"]
    if not isinstance(betas, tuple) or len(betas) != 2:
        raise MuonlabError(f"betas of an adamw group must be two numbers, not {betas!r}")
    for beta in betas:
        check_number("each of the betas of an adamw group", beta, below=1.0)
    if "momentum" in group:
        check_number("momentum of an adamw group", group["momentum"], below=1.0)


def check_parameter(param: Tensor, name: str, group: dict[str, Any]) -> None:
    """AdamW takes real tensors of every shape, so there is nothing to refuse."""


def describe_view(shape: torch.Size, group: dict[str, Any]) -> str:
    """AdamW works entry by entry and sees no matrix."""
    return "-"


def state_shapes(shape: torch.Size, group: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """The shapes of all that a parameter's state may hold."""
    return {"exp_avg": tuple(shape), "exp_avg_sq": tuple(shape), "step": ()}


def init_state(param: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """No updates so far, and two zero moments of the parameter's shape."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
    }


def update(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    groups: list[dict[str, Any]],
    process_group: "ProcessGroup | None",
) -> None:
    """One step, in place: Loshchilov & Hutter, arXiv 1711.05101, with the decay lr * weight_decay of PyTorch.

    All parameters share a device, a dtype and the settings of groups[0]. Where a scheduler has written a
    `momentum` into the group, as it does if others of the optimizer's groups have one, that is the first beta. Entries
    do not depend on each other, so every rank updates what it holds and needs no other.
    """
    settings = groups[0]
    beta1, beta2 = settings["betas"]
    adamw(
        [local_part(param) for param in params],
        [local_part(grad) for grad in grads],
        [local_part(state["exp_avg"]) for state in states],
        [local_part(state["exp_avg_sq"]) for state in states],
        max_exp_avg_sqs=[],
        state_steps=[state["step"] for state in states],
        fused=params[0].device.type in _FUSED,
        amsgrad=False,
        beta1=settings.get("momentum", beta1),
        beta2=beta2,
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
        maximize=False,
    )
