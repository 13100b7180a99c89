"""NanoGPT: a pre-norm decoder with rotary attention, the dense model of every experiment here."""

from muonlab.models.attention import Attention
from muonlab.models.decoder import Block, Decoder
from muonlab.models.mlp import MLP
from muonlab.models.registry import register_model
from muonlab.settings.model import NanoGPTSettings


@register_model("nanogpt")
class NanoGPT(Decoder):
    """Decoder-only transformer; `NanoGPTSettings` explains its settings."""

    settings: NanoGPTSettings

    def __init__(self, settings: NanoGPTSettings):
        super().__init__(settings)

    def _block(self, layer: int) -> Block:
        s = self.settings
        attention = Attention(
            s.d_model,
            s.num_heads,
            num_kv_heads=s.kv_heads,
            bias=s.bias,
            fused_qkv=s.fused_qkv,
            qk_norm=s.qk_norm,
            soft_cap=s.attention_soft_cap,
            rotary_fraction=s.rotary_fraction,
            forced_max=s.forced_max_logit,
            softmax_dtype=s.softmax_dtype,
            gate=s.attention_gate,
            sink=s.attention_sink,
        )
        return Block(
            attention, MLP(s.d_model, s.mlp_hidden, s.activation, s.bias, s.swiglu_clamp), self._norm
        )
