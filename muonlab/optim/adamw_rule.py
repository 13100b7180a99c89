"""AdamW, for what is not orthogonalised: Loshchilov and Hutter, arXiv 1711.05101.

With g the gradient, t the number of steps with this one, and b1, b2 the betas:

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g²          momentum, and the running mean square
    D = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)       transform
    W <- (1 - lr weight_decay) W - lr D                        decay and step

All four lines are one kernel of PyTorch where it has a fused one, on CPU and CUDA.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from muonlab.optim.rules import Batch, Rule, check_setting, group_under, register_rule
from muonlab.settings.check import Average
from muonlab.settings.optimizer import AdamWGroup

_FUSED = ("cpu", "cuda")


@register_rule("adamw")
class AdamWRule(Rule):
    """PyTorch's functional AdamW; the settings are explained at `AdamW`."""

    settings = AdamWGroup
    buffers = ("exp_avg", "exp_avg_sq")

    def prepare(self, group: dict[str, Any]) -> None:
        """Check the settings, and a momentum that a scheduler wrote into the group."""
        super().prepare(group)
        if "momentum" in group:
            check_setting(Average, group["momentum"], f"momentum of {group_under(self.name)}")

    def state_shapes(self, shape: torch.Size, group: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
        """The two averages, and the number of steps."""
        return {**super().state_shapes(shape, group), "step": ()}

    def required_state(self) -> tuple[str, ...]:
        """The two averages, and the number of steps."""
        return (*self.buffers, "step")

    def init_state(self, param: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """No steps so far."""
        step = torch.zeros((), dtype=torch.float32, device=param.device)
        return {"step": step, **super().init_state(param, dtype)}

    def update(self, batch: Batch) -> None:
        """One step. Entries do not depend on each other, so a rank updates the rows it holds and needs no other.

        Where a scheduler has written a `momentum` into the group, as it does if others of the optimizer's groups have
        one, that is the first beta.
        """
        s = batch.settings(AdamWGroup)
        adamw(
            batch.params,
            batch.grads,
            batch.buffers("exp_avg"),
            batch.buffers("exp_avg_sq"),
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in batch.states],
            fused=batch.params[0].device.type in _FUSED,
            amsgrad=False,
            beta1=batch.groups[0].get("momentum", s.betas[0]),
            beta2=s.betas[1],
            lr=s.lr,
            weight_decay=s.weight_decay,
            eps=s.eps,
            maximize=False,
        )
