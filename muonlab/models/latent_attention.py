"""Multi-head latent attention: queries, keys and values come from low-rank latents, positions from a shared key.

DeepSeek-V2 (arXiv 2405.04434, section 2.1; with these symbols V3, arXiv 2412.19437, eq. 1-11), also Kimi K2's.
Shape legend: B batch, T positions, D model width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.layout import AttentionLayout, ParameterRole
from muonlab.models.attention import (
    AttentionOutput,
    add_sink,
    attend,
    gated,
    head_rows,
    output_gate,
    rotate,
)
from muonlab.models.explicit_attention import attention_entropy, one_hot_share
from muonlab.models.norm import RMSNorm


class LatentAttention(nn.Module):
    """Causal attention of `num_heads` heads, each with logits (q^C . k^C + q^R . k^R) / sqrt(nope + rope).

    q_lora_rank: width of the queries' latent c^Q; 0: queries are computed from x itself.
    kv_lora_rank: width of the latent c^KV, which with the rotary key is all that a cache would keep.
    qk_nope_head_dim, qk_rope_head_dim: entries of a head's query without and with positions; all heads share the
        rotary key k^R.
    v_head_dim: entries of a head's value.
    soft_cap: c of c tanh(s/c) on the logits; 0: none. softmax_dtype, gate, sink: as in Attention.

    Both latents are RMS-normalised, so that the scale of the down-projections does not reach the logits.
    """

    sink: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        q_lora_rank: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        soft_cap: float = 0.0,
        softmax_dtype: str = "float32",
        gate: str = "none",
        sink: str = "none",
    ):
        super().__init__()
        self.num_heads, self.soft_cap = num_heads, soft_cap
        self.softmax_dtype = getattr(torch, softmax_dtype)
        self.nope_dim, self.rotary_dim, self.v_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        query_in = q_lora_rank or d_model
        self.query_down = linear(d_model, q_lora_rank) if q_lora_rank else None  # W^DQ
        self.query_norm = RMSNorm(q_lora_rank) if q_lora_rank else None
        self.query_up = linear(query_in, num_heads * qk_nope_head_dim)  # W^UQ
        self.query_rotary = linear(query_in, num_heads * qk_rope_head_dim)  # W^QR
        self.kv_down = linear(d_model, kv_lora_rank)  # W^DKV
        self.kv_norm = RMSNorm(kv_lora_rank)
        self.key_rotary = linear(d_model, qk_rope_head_dim)  # W^KR
        self.key_up = linear(kv_lora_rank, num_heads * qk_nope_head_dim)  # W^UK
        self.value_up = linear(kv_lora_rank, num_heads * v_head_dim)  # W^UV
        self.output = linear(num_heads * v_head_dim, d_model)  # W^O
        self.gate = output_gate(gate, d_model, num_heads, v_head_dim)
        add_sink(self, sink, num_heads)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        measure_entropy: bool = False,
        documents: Tensor | None = None,
    ) -> AttentionOutput:
        """x (B, T, D) with rotary tables (T, 1, rope); `documents` (B, T) int64, None: one per sequence."""
        q, k, v = self.project(x, cos, sin)
        out, logits, weights = attend(
            q,
            k,
            v,
            soft_cap=self.soft_cap,
            softmax_dtype=self.softmax_dtype,
            documents=documents,
            sink=self.sink,
            measure_weights=measure_entropy,
        )
        x = self.output(gated(out.transpose(1, 2), self.gate, x))
        measured = () if weights is None else (attention_entropy(weights), one_hot_share(weights))
        return AttentionOutput(x, logits if self.training else None, *measured)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B, H, T, nope + rope), values (B, H, T, v).

        Maps of the same input are one product: at small widths a step is more overhead than arithmetic.
        """
        heads = self.num_heads
        if self.query_down is None or self.query_norm is None:
            still, turned, latent, key = _products(
                x, self.query_up, self.query_rotary, self.kv_down, self.key_rotary
            )
        else:
            down, latent, key = _products(x, self.query_down, self.kv_down, self.key_rotary)  # eq. 6, 1, 3
            still, turned = _products(self.query_norm(down), self.query_up, self.query_rotary)  # eq. 7, 8
        # The shared key is rotated as one more head.
        turned = rotate(torch.cat((turned, key), -1).unflatten(-1, (heads + 1, -1)), cos, sin)
        keys, v = _products(self.kv_norm(latent), self.key_up, self.value_up)  # eq. 2, 5
        v = v.unflatten(-1, (heads, -1))
        turned_q, turned_k = turned.to(v.dtype).split((heads, 1), 2)
        q = torch.cat((still.unflatten(-1, (heads, -1)), turned_q), -1)  # eq. 9
        k = torch.cat((keys.unflatten(-1, (heads, -1)), turned_k.expand(-1, -1, heads, -1)), -1)  # eq. 4
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def layout(self, name: str) -> AttentionLayout:
        """Kimi K2's rule (arXiv 2507.20534, section 2.1): q^C and k^C share gamma, q^R carries all, k^R none of it."""
        return AttentionLayout(
            name,
            self.num_heads,
            self.num_heads,
            query=head_rows(self.query_up, self.nope_dim),
            key=head_rows(self.key_up, self.nope_dim),
            query_shared_key=head_rows(self.query_rotary, self.rotary_dim),
            shared_key=head_rows(self.key_rotary, self.rotary_dim),
        )

    def roles(self) -> dict[str, ParameterRole]:
        """The role of each parameter by its name within this module; only the up-projections have heads."""
        heads = self.num_heads
        roles = {
            "query_down.weight": ParameterRole("latent"),
            "query_norm.weight": ParameterRole("norm"),
            "query_up.weight": ParameterRole("query", heads),
            "query_rotary.weight": ParameterRole("query", heads),
            "kv_down.weight": ParameterRole("latent"),
            "kv_norm.weight": ParameterRole("norm"),
            "key_rotary.weight": ParameterRole("key"),
            "key_up.weight": ParameterRole("key", heads),
            "value_up.weight": ParameterRole("value", heads),
            "output.weight": ParameterRole("output", heads),
            "gate.weight": ParameterRole("gate", heads),
            "sink": ParameterRole("sink"),
        }
        return {name: roles[name] for name, _ in self.named_parameters()}


def _products(x: Tensor, *maps: nn.Linear) -> tuple[Tensor, ...]:
    """The outputs of several maps of x, computed as one product."""
    return F.linear(x, torch.cat([m.weight for m in maps])).split([m.out_features for m in maps], -1)
