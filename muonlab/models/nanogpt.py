"""NanoGPT: a pre-norm decoder with rotary attention, the dense model of every experiment here."""

from muonlab.models.attention import Attention
from muonlab.models.counts import Count, nanogpt_counts
from muonlab.models.decoder import Block, Decoder
from muonlab.models.mlp import MLP


class NanoGPT(Decoder):
    """Decoder-only transformer.

    vocab_size: tokens known. context: longest sequence, in tokens. d_model: width. num_layers: blocks.
    num_heads: query heads; head_dim is d_model / num_heads. num_kv_heads: key-value heads, None for as many.
    mlp_ratio: hidden units of the MLP over d_model. activation: gelu, relu2 or swiglu.
    bias: biases in every linear map. fused_qkv: query, key and value are one weight, with the same first numbers.
    qk_norm: RMSNorm with gains on queries and keys.
    attention_soft_cap: c of c tanh(s/c) on the attention logits; 0 for none.
    tied_head: the head is the embedding matrix. z_loss: weight of mean(logsumexp(logits)^2)
    (PaLM, arXiv 2204.02311, section 5); 0 for none. init_scale: matrices start normal with standard deviation
    init_scale / sqrt(fan_in), those that write to the residual stream divided by sqrt(2 num_layers).
    rotary_base: the theta of RoPE. rotary_fraction: share of each head that it turns, 0 for no positions.
    qk_init_scale: further factor on the first query and key weights; the first logits grow with its square.
    forced_max_logit: kappa, to which every head's largest |logit| of the batch is scaled; 0 leaves them.
    Raises MuonlabError for sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        context: int = 64,
        d_model: int = 64,
        num_layers: int = 6,
        num_heads: int = 2,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        activation: str = "relu2",
        bias: bool = False,
        fused_qkv: bool = False,
        qk_norm: bool = False,
        attention_soft_cap: float = 0.0,
        tied_head: bool = False,
        z_loss: float = 0.0,
        init_scale: float = 0.6,
        rotary_base: float = 10_000.0,
        rotary_fraction: float = 1.0,
        qk_init_scale: float = 1.0,
        forced_max_logit: float = 0.0,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}

        def block(_: int) -> Block:
            attention = Attention(
                d_model,
                num_heads,
                num_kv_heads=num_kv_heads,
                bias=bias,
                fused_qkv=fused_qkv,
                qk_norm=qk_norm,
                soft_cap=attention_soft_cap,
                rotary_fraction=rotary_fraction,
                forced_max=forced_max_logit,
            )
            return Block(attention, MLP(d_model, round(mlp_ratio * d_model), activation, bias), d_model)

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

    def counts(self, length: int) -> dict[str, Count]:
        """Parameters and floating-point operations of every part at sequence length `length`."""
        return nanogpt_counts(self.settings, length)
