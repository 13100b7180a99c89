"""The pre-norm decoder that every model here is: its forward, its measurements, its roles and layouts."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, ParameterRole
from muonlab.models.attention import AttentionOutput, rotary_tables
from muonlab.models.contract import ModelOutput
from muonlab.models.counts import model_counts, total
from muonlab.models.max_logits import (
    LayerLogits,
    LogitRange,
    at_least_fp32,
    bounded_logits,
    logit_extremes,
)
from muonlab.models.norm import RMSNorm
from muonlab.settings.model import DecoderSettings

IGNORED = -100  # the target of a position that has none, as in torch


class BlockPart(Protocol):
    """A module that declares the roles of its parameters, by their names within it."""

    @property
    def __call__(self) -> Callable[..., Any]: ...

    def roles(self) -> dict[str, ParameterRole]: ...

    def register_forward_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle: ...


class AttentionPart(BlockPart, Protocol):
    """The attention of a block, such as Attention and LatentAttention, where the members are explained."""

    rotary_dim: int

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def layout(self, name: str) -> AttentionLayout: ...


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); both parts declare their parameters' `roles()`."""

    def __init__(self, attention: AttentionPart, mlp: BlockPart, norm: Callable[[], nn.Module]):
        super().__init__()
        self.attention_norm = norm()
        self.attention = attention
        self.mlp_norm = norm()
        self.mlp = mlp

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, measure_entropy: bool, documents: Tensor | None
    ) -> AttentionOutput:
        """x (B, T, D); the attention's measurements pass through."""
        attended = self.attention(self.attention_norm(x), cos, sin, measure_entropy, documents)
        x = x + attended.x
        return attended._replace(x=x + self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """Embedding, blocks, norm and head; a model is a subclass whose `_block(i)` makes layer i."""

    cos: Tensor
    sin: Tensor

    def __init__(self, settings: DecoderSettings):
        super().__init__()
        self.settings = settings
        self.context, self.num_layers, self.z_loss = settings.context, settings.num_layers, settings.z_loss
        vocab_size, d_model = settings.vocabulary, settings.d_model
        # A seed's weights depend on this order, because every constructor draws before `_initialise` does.
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList([self._block(i) for i in range(settings.num_layers)])
        self.final_norm = self._norm()
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        cos, sin = rotary_tables(self.layers[0].attention.rotary_dim, settings.context, settings.rotary_base)
        self.register_buffer("cos", cos.unsqueeze(1), persistent=False)
        self.register_buffer("sin", sin.unsqueeze(1), persistent=False)
        self._logits: list[LayerLogits] | None = None
        self._extremes: LogitRange | None = None
        self._entropy: Tensor | None = None
        self._one_hot: Tensor | None = None
        self._initialise(settings.init_scale, settings.qk_init_scale)
        if settings.tied_head:
            self.head.weight = self.embedding.weight

    def _norm(self) -> nn.Module:
        """A norm of the residual stream, or nothing in its place."""
        return RMSNorm(self.settings.d_model) if self.settings.norm == "rms" else nn.Identity()

    @abstractmethod
    def _block(self, layer: int) -> Block:
        """The block of layer `layer`, counted from 0."""

    def _initialise(self, scale: float, qk_scale: float) -> None:
        roles = self.parameter_roles()
        for name, parameter in self.named_parameters():
            role = roles[name].role
            if role in ("bias", "sink"):
                nn.init.zeros_(parameter)
            elif role in ("embedding", "head"):
                nn.init.normal_(parameter, std=0.02)
            elif role != "norm":  # (out, in), or a stack of such
                to_residual = role == "output" or name.endswith((".down", ".down.weight"))
                depth = math.sqrt(2 * self.num_layers) if to_residual else 1.0
                blocks = roles[name].row_blocks
                parts = ("query", "key", "value") if blocks else (role,)
                for part, rows in zip(parts, parameter.split(blocks or len(parameter)), strict=True):
                    logits = qk_scale if part in ("query", "key") else 1.0
                    nn.init.normal_(rows, std=logits * scale / math.sqrt(parameter.shape[-1]) / depth)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        measure_entropy: bool = False,
        documents: Tensor | None = None,
    ) -> ModelOutput:
        """tokens and targets (B, T) int64, T <= context; positions whose target is -100 are ignored.

        measure_entropy: keep the values of `attention_entropy()` and `one_hot_share()`, at the cost of holding every
            attention weight.
        documents: (B, T) int64; a position sees only positions with its own number. For packed texts, and for padding
            as one more document. None: one text per sequence.

        In training mode this forward's attention logits are kept for `max_logits()`; evaluation forwards leave those of
        the last training forward alone.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise MuonlabError(
                f"a sequence of {length} tokens is longer than the model's context of {self.context}"
            )
        x = self.embedding(tokens)
        cos, sin = self.cos[:length], self.sin[:length]
        # A compiled forward assigns at its end, and of two assignments around FlexAttention torch keeps the first.
        if self.training and not torch.compiler.is_compiling():
            self._logits = self._extremes = None  # frees the queries and keys of the last forward
        attended = []
        for block in self.blocks:
            attended.append(block(x, cos, sin, measure_entropy, documents))
            x = attended[-1].x
        if self.training:
            self._logits, self._extremes = [layer.logits for layer in attended], None
        if measure_entropy:
            self._entropy = torch.stack([layer.entropy for layer in attended]).detach()
            self._one_hot = torch.stack([layer.one_hot for layer in attended])
        logits = self.head(self.final_norm(x))
        if targets is None:
            return ModelOutput(logits)
        flat = at_least_fp32(logits.flatten(0, 1))
        cross_entropy = F.cross_entropy(flat, targets.flatten())
        if not self.z_loss:
            return ModelOutput(logits, cross_entropy, cross_entropy)
        # L = CE + z * mean_t (ln sum_v exp logit_tv)^2, over the positions that have a target
        counts = targets.flatten() != IGNORED
        z_loss = (flat.logsumexp(-1).square() * counts).sum() / counts.sum()
        return ModelOutput(logits, cross_entropy + self.z_loss * z_loss, cross_entropy)

    @property
    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return [cast(Block, block) for block in self.blocks]

    @property
    def layer_names(self) -> list[str]:
        """What layouts and columns call the layers: layer_00, layer_01, ..."""
        return [f"layer_{i:02d}" for i in range(self.num_layers)]

    def logit_extremes(self) -> LogitRange:
        """Highest and lowest visible scaled logit of the last training forward, each (num_layers, num_heads), exact.

        Raises MuonlabError before the first forward in training mode.
        """
        if self._extremes is None:
            self._extremes = logit_extremes(self._trained())
            self._logits = None  # frees the queries and keys
        return self._extremes

    def bounded_logits(self, limit: float = torch.inf, absolute: bool = False) -> tuple[LogitRange, Tensor]:
        """Bounds of `logit_extremes()`, exact for heads that may reach `limit` (see max_logits.bounded_logits)."""
        if self._extremes is not None:
            return self._extremes, torch.ones_like(self._extremes.highest, dtype=torch.bool)
        return bounded_logits(self._trained(), limit, absolute)

    def _trained(self) -> list[LayerLogits]:
        if self._logits is None:
            raise MuonlabError("no max logits yet: they are those of the last forward in training mode")
        return self._logits

    def max_logits(self, absolute: bool = False) -> Tensor:
        """Max logit of each head, (num_layers, num_heads), of the last training forward: signed, or of |logit|."""
        extremes = self.logit_extremes()
        return extremes.absolute if absolute else extremes.highest

    def attention_entropy(self) -> Tensor:
        """Mean attention entropy in nats, (num_layers, num_heads), of the last forward with measure_entropy."""
        if self._entropy is None:
            raise MuonlabError("no attention entropy yet: call the model with measure_entropy=True")
        return self._entropy

    def one_hot_share(self) -> Tensor:
        """Share of attention rows with a weight above 0.95, (num_layers, num_heads), as `attention_entropy()`."""
        if self._one_hot is None:
            raise MuonlabError("no attention weights yet: call the model with measure_entropy=True")
        return self._one_hot

    @contextmanager
    def watch_attention(self, look: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """Within it, every forward calls `look(queries, keys)` once per layer, first to last.

        Queries (B, H, T, d) and keys (B, K, T, d) are those that the logits multiply. They are computed a second time,
        from the input of each layer's attention, so that no other forward carries them.
        """

        def project(attention: AttentionPart, inputs: tuple[Any, ...]) -> None:
            x, cos, sin, *_ = inputs
            queries, keys, *_ = attention.project(x, cos, sin)
            look(queries, keys)

        hooks = [block.attention.register_forward_pre_hook(project) for block in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def attention_layouts(self) -> list[AttentionLayout]:
        """The rows that QK-Clip may scale, one layout per layer."""
        return [b.attention.layout(n) for n, b in zip(self.layer_names, self.layers, strict=True)]

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The role of every parameter by its name; a tied head is one parameter and appears as the embedding."""
        roles = {"embedding.weight": ParameterRole("embedding")}
        if self.settings.norm == "rms":
            roles["final_norm.weight"] = ParameterRole("norm")
        if self.head.weight is not self.embedding.weight:
            roles["head.weight"] = ParameterRole("head")
        for i, block in enumerate(self.layers):
            norms = ("attention_norm", "mlp_norm") if self.settings.norm == "rms" else ()
            roles |= {f"blocks.{i}.{n}.weight": ParameterRole("norm") for n in norms}
            roles |= {f"blocks.{i}.attention.{n}": r for n, r in block.attention.roles().items()}
            roles |= {f"blocks.{i}.mlp.{n}": r for n, r in block.mlp.roles().items()}
        return roles

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one training token (forward + backward) at sequence length `length`.

        6 per weight that this token multiplies, so of the routed experts only the active ones count, and the logits
        and weighted sums of attention (see counts.py).
        """
        return total(model_counts(self.settings, length).values()).flops
