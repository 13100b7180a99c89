"""The settings of each model family: sizes and choices, checked before torch is imported."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge, Gt, Le

from muonlab.errors import MuonlabError
from muonlab.settings.check import NonNegative, Positive, Share

LARGEST = 10**9  # of a size; anything larger is a typing error
Size = Annotated[int, Ge(1), Le(LARGEST)]
Layers = Annotated[int, Ge(1), Le(10_000)]
SizeOrNone = Annotated[int, Ge(0), Le(LARGEST)]  # 0: there is none

Activation = Literal["gelu", "relu2", "swiglu"]
AttentionKind = Literal["mla", "mha"]
Balance = Literal["bias", "loss", "none"]
Norm = Literal["rms", "none"]
SoftmaxDtype = Literal["float32", "bfloat16", "float16"]
Gate = Literal["none", "head", "element"]
Sink = Literal["none", "zero", "learnt"]


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """The settings of every decoder.

    vocab_size: number of tokens; None: as many as the data has. context: longest sequence, in tokens. d_model: width.
    num_layers: blocks. num_heads: query heads; head_dim is d_model / num_heads. qk_norm: RMSNorm with gains on queries
    and keys. attention_soft_cap: c of c tanh(s/c) on the attention logits; 0: none. tied_head: the head is the
    embedding matrix. z_loss: weight of mean(logsumexp(logits)^2) (PaLM, arXiv 2204.02311, section 5); 0: none.
    init_scale: matrices start normal with standard deviation init_scale / sqrt(fan_in), those that write to the
    residual stream divided by sqrt(2 num_layers). rotary_base: the theta of RoPE. qk_init_scale: further factor on the
    first query and key weights; the first logits grow with its square. norm: RMSNorm before every attention, every MLP
    and the head, or "none". softmax_dtype: to which the attention logits are rounded, and in which their softmax is
    taken; the max logits are those before the rounding. attention_gate: a sigmoid gate of the attention's input on its
    output, one per "head" or per "element" of a head (arXiv 2505.06708). attention_sink: a further logit in every
    row's softmax whose weight goes to no value, "zero" or "learnt" per head; the max logits are those of q.k.
    swiglu_clamp: c > 0 makes every swiglu silu(min(gate, c)) * min(max(up, -c), c) (GPT-OSS: 7); 0: no clamp.
    """

    name: str
    vocab_size: Size | None = None
    context: Size = 64
    d_model: Size = 64
    num_layers: Layers = 6
    num_heads: Size = 2
    qk_norm: bool = False
    attention_soft_cap: NonNegative = 0.0
    tied_head: bool = False
    z_loss: NonNegative = 0.0
    init_scale: NonNegative = 0.6
    rotary_base: Positive = 10_000.0
    qk_init_scale: NonNegative = 1.0
    norm: Norm = "rms"
    softmax_dtype: SoftmaxDtype = "float32"
    attention_gate: Gate = "none"
    attention_sink: Sink = "none"
    swiglu_clamp: NonNegative = 0.0

    @property
    def vocabulary(self) -> int:
        """Number of tokens. Raises MuonlabError if neither the settings nor the data have set it."""
        if self.vocab_size is None:
            raise MuonlabError("model.vocab_size is not known yet; unless it is set, the data determine it")
        return self.vocab_size

    def _check_heads(self, rotary_fraction: float) -> None:
        if self.d_model % self.num_heads:
            raise MuonlabError(
                f"model.num_heads={self.num_heads} does not divide the width model.d_model={self.d_model}"
            )
        rotary_dim(self.d_model // self.num_heads, rotary_fraction)


@dataclass(frozen=True, kw_only=True)
class NanoGPTSettings(DecoderSettings):
    """A dense decoder.

    num_kv_heads: key-value heads, None for as many as query heads; fewer is grouped-query, 1 multi-query attention.
    mlp_ratio: hidden units of the MLP over d_model. bias: biases in every linear map. fused_qkv: query, key and value
    are one weight, with the same first numbers. rotary_fraction: share of each head's entries that RoPE turns; 0: no
    positions. forced_max_logit: kappa to which every head's largest |logit| of the batch is scaled; 0 leaves them.
    """

    name: Literal["nanogpt"] = "nanogpt"
    num_kv_heads: Size | None = None
    mlp_ratio: Annotated[float, Gt(0), Le(LARGEST)] = 4.0
    activation: Activation = "relu2"
    bias: bool = False
    fused_qkv: bool = False
    rotary_fraction: Share = 1.0
    forced_max_logit: NonNegative = 0.0

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden units of the MLP."""
        return round(self.mlp_ratio * self.d_model)

    def __post_init__(self) -> None:
        self._check_heads(self.rotary_fraction)
        if self.num_heads % self.kv_heads:
            raise MuonlabError(
                f"model.num_kv_heads={self.kv_heads} does not divide model.num_heads={self.num_heads}"
            )
        if self.swiglu_clamp and self.activation != "swiglu":
            raise MuonlabError(
                f"model.swiglu_clamp={self.swiglu_clamp:g} is for model.activation=swiglu, not {self.activation}"
            )
        if self.mlp_hidden < 1:
            raise MuonlabError(
                f"model.mlp_ratio={self.mlp_ratio} of model.d_model={self.d_model} leaves the MLP without hidden units"
            )


@dataclass(frozen=True, kw_only=True)
class MoESettings(DecoderSettings):
    """A decoder whose later layers have routed experts, after DeepSeek-V3 (arXiv 2412.19437) and Kimi K2 (2507.20534).

    attention: "mla" (multi-head latent attention: q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and
    v_head_dim, as in LatentAttention) or "mha" (head_dim d_model / num_heads; qk_norm is for it alone).
    num_dense_layers: first layers with an MLP of dense_hidden units instead of experts. All are swiglu.
    num_experts: routed experts per layer, of expert_hidden units each. experts_per_token: active ones.
    sparsity: experts over active experts; sets num_experts to sparsity * experts_per_token and so keeps the active
    parameters, except the router's, fixed; None: num_experts is used.
    num_shared_experts: experts that every token uses, as one MLP; 0: none.
    routed_scaling, balance, balance_speed, balance_loss: as in Router; a speed or weight of 0 balances nothing.
    """

    name: Literal["moe"] = "moe"
    num_layers: Layers = 4
    attention: AttentionKind = "mla"
    q_lora_rank: SizeOrNone = 0
    kv_lora_rank: Size = 32
    qk_nope_head_dim: Size = 16
    qk_rope_head_dim: Annotated[int, Ge(2), Le(LARGEST)] = 16
    v_head_dim: Size = 32
    num_dense_layers: SizeOrNone = 1
    dense_hidden: Size = 192
    num_experts: Size = 16
    experts_per_token: Size = 2
    sparsity: Annotated[float, Ge(1), Le(LARGEST)] | None = None
    expert_hidden: Size = 64
    num_shared_experts: SizeOrNone = 1
    routed_scaling: Positive = 1.414
    balance: Balance = "bias"
    balance_speed: NonNegative = 1e-3
    balance_loss: NonNegative = 1e-2

    @property
    def routed_experts(self) -> int:
        """Routed experts per layer."""
        if self.sparsity is None:
            return self.num_experts
        return int(self.sparsity * self.experts_per_token)

    def __post_init__(self) -> None:
        if self.attention == "mha":
            self._check_heads(rotary_fraction=1.0)
        elif self.qk_norm:
            raise MuonlabError(
                "model.qk_norm is for model.attention=mha; latent attention normalises its latents instead"
            )
        if self.qk_rope_head_dim % 2:
            raise MuonlabError(
                f"model.qk_rope_head_dim must be even, since pairs are rotated, not {self.qk_rope_head_dim}"
            )
        if self.num_dense_layers >= self.num_layers:
            raise MuonlabError(
                f"model.num_dense_layers must be from 0 to num_layers - 1 = {self.num_layers - 1},"
                f" not {self.num_dense_layers}"
            )
        if self.sparsity is not None and self.sparsity * self.experts_per_token != self.routed_experts:
            raise MuonlabError(
                f"model.sparsity={self.sparsity} of model.experts_per_token={self.experts_per_token} must give a"
                " whole number of experts"
            )
        if self.experts_per_token > self.routed_experts:
            raise MuonlabError(
                f"model.experts_per_token must be from 1 to num_experts={self.routed_experts},"
                f" not {self.experts_per_token}"
            )


Decoder = TypeVar("Decoder", bound=DecoderSettings)


def with_vocabulary(settings: Decoder, vocab_size: int = 256) -> Decoder:
    """The settings with a vocabulary of `vocab_size` tokens (default: bytes), unless they set their own."""
    return settings if settings.vocab_size is not None else replace(settings, vocab_size=vocab_size)


MODEL_SETTINGS: dict[str, type[DecoderSettings]] = {"nanogpt": NanoGPTSettings, "moe": MoESettings}


def rotary_dim(head_dim: int, fraction: float) -> int:
    """Entries of a head that are rotated, fraction * head_dim. Raises MuonlabError if that is not an even integer."""
    rotated = fraction * head_dim
    if rotated % 2:
        raise MuonlabError(
            f"model.rotary_fraction={fraction:g} of head_dim={head_dim} rotates {rotated:g} entries;"
            f" it must be an even number from 0 to {head_dim}"
        )
    return int(rotated)
