"""The AdamW rule for what is not orthogonalised: PyTorch's own functional AdamW, with state of at least fp32."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from muonlab.errors import MuonlabError
from muonlab.optim.checks import check_number

FUSED_DEVICES = ("cpu", "cuda")


def prepare(group: dict[str, Any]) -> None:
    """Check the settings of one parameter group; raises MuonlabError."""
    for name in ("lr", "eps", "weight_decay"):
        check_number(f"{name} of an adamw group", group[name])
    betas = group["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise MuonlabError(f"betas of an adamw group must be two numbers, not {betas!r}")
    group["betas"] = tuple(betas)
    for beta in betas:
        check_number("each of the betas of an adamw group", beta, below=1.0)


def check_parameter(param: Tensor, name: str, group: dict[str, Any]) -> None:
    """AdamW takes tensors of every shape."""


def view_of(shape: torch.Size, group: dict[str, Any]) -> str:
    """No matrix view: AdamW works entry by entry."""
    return "-"


def init_state(param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zero moments of the parameter's shape and the number of updates so far."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
    }


def update(
    params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    """One AdamW step, in place: Loshchilov & Hutter, arXiv 1711.05101, with decay lr * weight_decay as in PyTorch.

    All parameters share one device, one dtype and the settings of groups[0].
    """
    group = groups[0]
    adamw(
        params,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=params[0].device.type in FUSED_DEVICES,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
