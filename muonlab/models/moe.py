"""MoE: the architecture of Kimi K2 and DeepSeek-V3, scaled down."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonlab.errors import MuonlabError
from muonlab.layout import ParameterRole
from muonlab.models.attention import Attention
from muonlab.models.contract import ModelOutput
from muonlab.models.decoder import AttentionPart, Block, Decoder
from muonlab.models.experts import Experts, group_by_expert
from muonlab.models.latent_attention import LatentAttention
from muonlab.models.mlp import MLP
from muonlab.models.registry import register_model
from muonlab.models.router import Router, normalised_scores
from muonlab.settings.model import MoESettings


class Seen(NamedTuple):
    """Of a layer's last training forward: router logits (N, E), outputs of the experts (N, D), shared ones or None."""

    logits: Tensor
    routed: Tensor
    shared: Tensor | None


class ExpertLayer(nn.Module):
    """shared(x) + sum over the chosen experts of gate * expert(x) (arXiv 2412.19437, eq. 12), in place of an MLP.

    In training mode it counts loads, and keeps the balance loss and the tensors that `measurements` reads.
    """

    def __init__(self, router: Router, experts: Experts, shared: MLP | None):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.balance_loss: Tensor | None = None
        self.seen: Seen | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x, (B, T, D)."""
        tokens = x.flatten(0, 1)
        choices, gates, logits = self.router(tokens)
        groups = group_by_expert(choices, self.router.num_experts)
        routed = self.experts(tokens, gates, groups)
        shared = self.shared(tokens) if self.shared is not None else None
        if self.training:
            loads = groups.loads
            self.router.loads += loads
            if self.router.balance == "loss":
                self.balance_loss = self.router.auxiliary_loss(logits, loads)
            self.seen = Seen(logits.detach(), routed.detach(), None if shared is None else shared.detach())
        return (routed if shared is None else routed + shared).view_as(x)

    @torch.no_grad()
    def measurements(self) -> dict[str, Tensor]:
        """0-dim tensors of the last training forward; `MoE.measurements` explains them."""
        if self.seen is None:
            raise MuonlabError("no measurements yet: they are those of the last forward in training mode")
        logits, routed, shared = self.seen
        loads = self.router.step_loads().float()
        entropy = torch.special.entr(normalised_scores(logits)).sum(-1).mean()
        measured = {
            "balance/violation": loads.max() / loads.mean() - 1,
            "router/entropy": entropy,
            "router/max_logit": logits.max(),
            "experts/routed_norm": _rms(routed),
        }
        return measured if shared is None else measured | {"experts/shared_norm": _rms(shared)}

    def roles(self) -> dict[str, ParameterRole]:
        """The role of each parameter by its name within this module."""
        roles = {"router.weight": ParameterRole("router")}
        roles |= {f"experts.{name}": role for name, role in self.experts.roles().items()}
        if self.shared is not None:
            roles |= {f"shared.{name}": role for name, role in self.shared.roles().items()}
        return roles


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) * x.numel() ** -0.5


@register_model("moe")
class MoE(Decoder):
    """Decoder whose later layers have routed experts; `MoESettings` explains its settings."""

    settings: MoESettings

    def __init__(self, settings: MoESettings):
        super().__init__(settings)

    def _block(self, layer: int) -> Block:
        s = self.settings
        attention: AttentionPart
        if s.attention == "mla":
            attention = LatentAttention(
                s.d_model,
                s.num_heads,
                q_lora_rank=s.q_lora_rank,
                kv_lora_rank=s.kv_lora_rank,
                qk_nope_head_dim=s.qk_nope_head_dim,
                qk_rope_head_dim=s.qk_rope_head_dim,
                v_head_dim=s.v_head_dim,
                soft_cap=s.attention_soft_cap,
                softmax_dtype=s.softmax_dtype,
                gate=s.attention_gate,
                sink=s.attention_sink,
            )
        else:
            attention = Attention(
                s.d_model,
                s.num_heads,
                qk_norm=s.qk_norm,
                soft_cap=s.attention_soft_cap,
                softmax_dtype=s.softmax_dtype,
                gate=s.attention_gate,
                sink=s.attention_sink,
            )
        if layer < s.num_dense_layers:
            return Block(
                attention, MLP(s.d_model, s.dense_hidden, "swiglu", clamp=s.swiglu_clamp), self._norm
            )
        router = Router(
            s.d_model,
            s.routed_experts,
            s.experts_per_token,
            scaling=s.routed_scaling,
            balance=s.balance,
            balance_speed=s.balance_speed,
            balance_loss=s.balance_loss,
        )
        experts = Experts(s.routed_experts, s.d_model, s.expert_hidden, s.swiglu_clamp)
        hidden = s.num_shared_experts * s.expert_hidden
        shared = MLP(s.d_model, hidden, "swiglu", clamp=s.swiglu_clamp) if hidden else None
        return Block(attention, ExpertLayer(router, experts, shared), self._norm)

    @property
    def expert_layers(self) -> dict[int, ExpertLayer]:
        """The layers with routed experts by number, from 0, ascending."""
        return {i: block.mlp for i, block in enumerate(self.layers) if isinstance(block.mlp, ExpertLayer)}

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        measure_entropy: bool = False,
        documents: Tensor | None = None,
    ) -> ModelOutput:
        """As Decoder.forward; in training mode the loss includes every layer's balance loss, if there is one."""
        output = super().forward(tokens, targets, measure_entropy, documents)
        layers = self.expert_layers.values()
        losses = [layer.balance_loss for layer in layers if layer.balance_loss is not None]
        if not torch.compiler.is_compiling():  # see Decoder.forward; the next forward replaces it
            for layer in layers:
                layer.balance_loss = None  # it would keep this forward's graph alive
        if not self.training or not losses or output.loss is None:
            return output
        return ModelOutput(output.logits, output.loss + torch.stack(losses).sum(), output.cross_entropy)

    def update_balance(self) -> None:
        """Call after every optimizer step: moves the balance biases and starts counting the loads of the next step.

        The loads are those of all training forwards since the last call (micro-batches), summed over the ranks of
        torch.distributed where it is initialised, so that every rank's bias stays the same.
        """
        routers = [layer.router for layer in self.expert_layers.values()]
        loads = torch.stack([router.loads for router in routers])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loads)
        for router, total in zip(routers, loads, strict=True):
            router.end_step(total)

    def expert_loads(self) -> Tensor:
        """Tokens that went to each expert, float (layers with experts, experts).

        Counted over the training forwards since `update_balance`; right after it, over the step that it ended and over
        all ranks. Each row sums to tokens * experts_per_token, since no token is ever dropped.
        """
        return torch.stack([layer.router.step_loads() for layer in self.expert_layers.values()]).float()

    def measurements(self) -> dict[str, Tensor]:
        """Scalars of every layer with experts, {name/layer_01: 0-dim tensor}, with no wait for the device.

        balance/violation: largest over mean load - 1 of `expert_loads()`; 0: perfect balance (MaxVio, arXiv 2408.15664,
            section 4.1).

        Of the last training forward:

        router/entropy: mean entropy in nats of a token's normalised scores, at most ln(experts).
        router/max_logit: the largest score before the sigmoid.
        experts/shared_norm, experts/routed_norm: RMS of the outputs of the shared and the routed experts.

        Raises MuonlabError before the first forward in training mode.
        """
        return {
            f"{quantity}/{self.layer_names[i]}": value
            for i, layer in self.expert_layers.items()
            for quantity, value in layer.measurements().items()
        }
