"""MoE: Kimi K2's and DeepSeek-V3's architecture in small."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonlab.errors import MuonlabError, unknown_name
from muonlab.layout import ParameterRole
from muonlab.models.attention import Attention
from muonlab.models.counts import Count, moe_counts
from muonlab.models.decoder import Block, Decoder, ModelOutput
from muonlab.models.experts import Experts, group_by_expert, num_routed_experts
from muonlab.models.latent_attention import LatentAttention
from muonlab.models.mlp import MLP
from muonlab.models.router import Router, normalised_scores

ATTENTIONS = ("mla", "mha")


class Seen(NamedTuple):
    """What a layer's last training forward leaves to measure: router logits (N, E), outputs (N, D) or None."""

    logits: Tensor
    routed: Tensor
    shared: Tensor | None


class ExpertLayer(nn.Module):
    """shared(x) + sum over the chosen experts of gate * expert(x) (arXiv 2412.19437, eq. 12), in place of an MLP.

    In training mode it counts loads, and keeps the balance loss and what `measurements` reads.
    """

    def __init__(self, router: Router, experts: Experts, shared: MLP | None):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.balance_loss: Tensor | None = None
        self.seen: Seen | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x, (B, T, D)."""
        tokens = x.flatten(0, 1)
        chosen, gates, logits = self.router(tokens)
        groups = group_by_expert(chosen, self.router.num_experts)
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
        """0-dim tensors of the last training forward; what they are stands at `MoE.measurements`."""
        if self.seen is None:
            raise MuonlabError(
                "nothing is measured yet: measurements are of the last forward in training mode"
            )
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


class MoE(Decoder):
    """Decoder whose later layers have routed experts, after DeepSeek-V3 (arXiv 2412.19437) and Kimi K2 (2507.20534).

    attention: "mla" (multi-head latent attention: q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and
    v_head_dim, as in LatentAttention) or "mha" (head_dim d_model / num_heads; qk_norm is for it alone).
    num_dense_layers: first layers with an MLP of dense_hidden units instead of experts. All are swiglu.
    num_experts: routed experts a layer, of expert_hidden units each. experts_per_token: active ones.
    sparsity: experts over active experts; sets num_experts to sparsity * experts_per_token and so leaves the active
    parameters as they are, but for the router's; None takes num_experts.
    num_shared_experts: experts that every token uses, as one MLP; 0 for none.
    routed_scaling, balance, balance_speed, balance_loss: as in Router.
    The rest is as in NanoGPT. Raises MuonlabError for sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        context: int = 64,
        d_model: int = 64,
        num_layers: int = 4,
        num_heads: int = 2,
        attention: str = "mla",
        q_lora_rank: int = 0,
        kv_lora_rank: int = 32,
        qk_nope_head_dim: int = 16,
        qk_rope_head_dim: int = 16,
        v_head_dim: int = 32,
        num_dense_layers: int = 1,
        dense_hidden: int = 192,
        num_experts: int = 16,
        experts_per_token: int = 2,
        sparsity: float | None = None,
        expert_hidden: int = 64,
        num_shared_experts: int = 1,
        routed_scaling: float = 1.414,
        balance: str = "bias",
        balance_speed: float = 1e-3,
        balance_loss: float = 1e-2,
        qk_norm: bool = False,
        attention_soft_cap: float = 0.0,
        tied_head: bool = False,
        z_loss: float = 0.0,
        init_scale: float = 0.6,
        rotary_base: float = 10_000.0,
        qk_init_scale: float = 1.0,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if attention not in ATTENTIONS:
            raise unknown_name("attention", attention, ATTENTIONS)
        if attention == "mla" and qk_norm:
            raise MuonlabError(
                "qk_norm is for attention=mha; latent attention normalises its latents instead"
            )
        if not 0 <= num_dense_layers < num_layers:
            raise MuonlabError(
                f"num_dense_layers must be from 0 to num_layers - 1 = {num_layers - 1}, not {num_dense_layers}"
            )
        for what, value in dict(dense_hidden=dense_hidden, expert_hidden=expert_hidden).items():
            if value < 1:
                raise MuonlabError(f"{what} must be at least 1, not {value}")
        routed = num_routed_experts(num_experts, experts_per_token, sparsity)

        def block(i: int) -> Block:
            if attention == "mla":
                layer = LatentAttention(
                    d_model,
                    num_heads,
                    q_lora_rank=q_lora_rank,
                    kv_lora_rank=kv_lora_rank,
                    qk_nope_head_dim=qk_nope_head_dim,
                    qk_rope_head_dim=qk_rope_head_dim,
                    v_head_dim=v_head_dim,
                    soft_cap=attention_soft_cap,
                )
            else:
                layer = Attention(d_model, num_heads, qk_norm=qk_norm, soft_cap=attention_soft_cap)
            if i < num_dense_layers:
                return Block(layer, MLP(d_model, dense_hidden, "swiglu"), d_model)
            router = Router(
                d_model,
                routed,
                experts_per_token,
                scaling=routed_scaling,
                balance=balance,
                balance_speed=balance_speed,
                balance_loss=balance_loss,
            )
            shared = num_shared_experts * expert_hidden
            return Block(
                layer,
                ExpertLayer(
                    router,
                    Experts(routed, d_model, expert_hidden),
                    MLP(d_model, shared, "swiglu") if shared else None,
                ),
                d_model,
            )

        super().__init__(
            block,
            vocab_size=vocab_size,
            context=context,
            d_model=d_model,
            num_layers=num_layers,
            tied_head=tied_head,
            z_loss=z_loss,
            init_scale=init_scale,
            qk_init_scale=qk_init_scale,
            rotary_base=rotary_base,
        )
        self.settings = settings

    @property
    def expert_layers(self) -> dict[str, ExpertLayer]:
        """The layers with routed experts by their keys in `max_logits()`."""
        layers = zip(self.layer_names, self.blocks, strict=True)
        return {name: block.mlp for name, block in layers if isinstance(block.mlp, ExpertLayer)}

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        measure_entropy: bool = False,
        documents: Tensor | None = None,
    ) -> ModelOutput:
        """As Decoder.forward; in training mode the loss includes every layer's balance loss, if there is one."""
        output = super().forward(tokens, targets, measure_entropy, documents)
        losses = [layer.balance_loss for layer in self.expert_layers.values()]
        for layer in self.expert_layers.values():
            layer.balance_loss = None  # it would keep this forward's graph alive
        if not self.training or losses[0] is None or targets is None:
            return output
        return output._replace(loss=output.loss + torch.stack(losses).sum())

    def update_balance(self) -> None:
        """Call after every optimizer step: moves the balance biases, and begins to count the next step's loads.

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

        Of the training forwards since `update_balance`, or right after it of the step that it ended (then summed over
        ranks); each row sums to tokens * experts_per_token, since none is ever dropped.
        """
        return torch.stack([layer.router.step_loads() for layer in self.expert_layers.values()]).float()

    def measurements(self) -> dict[str, Tensor]:
        """Scalars of every layer with experts, {name/layer_01: 0-dim tensor}, with no wait for the device.

        balance/violation: largest over mean load - 1 of `expert_loads()`, 0 for perfect balance (MaxVio, arXiv
        2408.15664, section 4.1). Of the last training forward: router/entropy, the mean entropy in nats of a token's
        normalised scores, at most ln(experts); router/max_logit, the largest score before the sigmoid;
        experts/shared_norm and experts/routed_norm, the RMS of what the shared and the routed experts add.
        Raises MuonlabError before the first forward in training mode.
        """
        return {
            f"{what}/{name}": value
            for name, layer in self.expert_layers.items()
            for what, value in layer.measurements().items()
        }

    def counts(self, length: int) -> dict[str, Count]:
        """Parameters and floating-point operations of every part at sequence length `length`."""
        return moe_counts(self.settings, length)
