"""Which experts a token goes to: sigmoid scores, the best k of them, and balance by bias or by a loss.

After DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) and Kimi K2.
Shape legend: N tokens, D width, E experts, k experts per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from muonlab.models.max_logits import at_least_fp32

# Added to the sum of the selected scores, so that scores that all round to 0 give gates of 0.
SMALLEST = 1e-20


class Router(nn.Module):
    """Scores every expert for a token, selects `experts_per_token` of them and weights each by a gate.

    scaling: factor on the gates, which sum to it; sqrt(k) keeps the size of a sum of k independent experts (K2: 2.827).
    balance: how the experts are kept equally used.
        "bias": a bias, added to the scores for the selection only; `end_step` moves it by `balance_speed` against each
            expert's load.
        "loss": `balance_loss` times Switch's loss is added to that of the model.
        "none": neither.

    The scores are computed in fp32 at least, whatever the autocast. The bias stays in fp32 when the model is cast,
    since shorter types would lose its steps. The loads are not buffers, because DistributedDataParallel would overwrite
    those of the other ranks with the first rank's.
    """

    balance_bias: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        experts_per_token: int,
        *,
        scaling: float = 1.0,
        balance: str = "bias",
        balance_speed: float = 1e-3,
        balance_loss: float = 1e-2,
    ):
        super().__init__()
        self.num_experts, self.experts_per_token, self.scaling = num_experts, experts_per_token, scaling
        self.balance, self.balance_speed, self.loss_weight = balance, balance_speed, balance_loss
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)
        self.register_buffer("balance_bias", torch.zeros(num_experts))
        self.loads = torch.zeros(num_experts, dtype=torch.int64)  # since the last end_step
        self.ended_loads = torch.zeros(num_experts, dtype=torch.int64)  # of the step that it ended

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        bias = self.balance_bias
        super()._apply(fn, recurse)
        self.balance_bias, self.loads, self.ended_loads = (
            x.to(self.weight.device) for x in (bias, self.loads, self.ended_loads)
        )
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> selected experts (N, k) int64, their gates (N, k), and all logits (N, E)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = at_least_fp32(x) @ at_least_fp32(self.weight).T
        scores = logits.sigmoid()  # s_i = sigmoid(u . e_i), eq. 15
        ranked = scores.detach() + self.balance_bias if self.balance == "bias" else scores.detach()
        experts = ranked.topk(self.experts_per_token, dim=-1, sorted=False).indices  # eq. 16
        affinity = scores.gather(-1, experts)
        gates = affinity * (self.scaling / (affinity.sum(-1, keepdim=True) + SMALLEST))  # eq. 13
        return experts, gates, logits

    def auxiliary_loss(self, logits: Tensor, loads: Tensor) -> Tensor:
        """The loss of Switch Transformers (arXiv 2101.03961, eq. 4), for k experts per token, times its weight.

        a E sum_i f_i P_i, with f_i the share of assignments that went to expert i, and P_i the mean of its normalised
        scores; the gradient flows through P_i only. It equals `a` where all experts are used equally.
        """
        share = loads.to(logits.dtype) / loads.sum()
        probability = normalised_scores(logits).mean(0)
        return self.loss_weight * self.num_experts * (share * probability).sum()

    def step_loads(self) -> Tensor:
        """Tokens of each expert in this step's training forwards; before the first, in the last step's: (E,) int64."""
        return torch.where(self.loads.any(), self.loads, self.ended_loads)

    @torch.no_grad()
    def end_step(self, loads: Tensor) -> None:
        """With the `loads` (E,) of all ranks: b_i += u sign(mean load - load_i) (arXiv 2408.15664, algorithm 1)."""
        if self.balance == "bias":
            self.balance_bias += self.balance_speed * (loads.float().mean() - loads).sign()
        self.loads, self.ended_loads = torch.zeros_like(loads), loads


def normalised_scores(logits: Tensor) -> Tensor:
    """Scores as a distribution over the experts, (N, E): s_i / sum_j s_j (arXiv 2412.19437, eq. 19)."""
    scores = logits.sigmoid()
    return scores / (scores.sum(-1, keepdim=True) + SMALLEST)
