"""The contract of a model: all that training, recording and the clip use of it.

Shape legend: B batch, T positions, L attention layers, H query heads, K key-value heads, d head_dim, E experts.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from muonlab.errors import MuonlabError
from muonlab.layout import AttentionLayout, ParameterRole
from muonlab.models.max_logits import LogitRange


class ModelOutput(NamedTuple):
    """The result of a forward.

    logits: (B, T, vocab_size).
    loss: the scalar to differentiate, cross-entropy plus whatever the model adds (z-loss, balance loss); None without
        targets.
    cross_entropy: the first part of the loss, in nats per token; None without targets.
    """

    logits: Tensor
    loss: Tensor | None = None
    cross_entropy: Tensor | None = None


class CausalModel(Protocol):
    """A language model that LanguageModel can train: an nn.Module with the members below.

    Its settings have `context`, the longest sequence in tokens, and `vocab_size`, None for the vocabulary of the data.
    """

    # Inherited from nn.Module.
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by name."""

    def train(self, mode: bool = True) -> object:
        """Training mode, in which a forward keeps its attention logits for `logit_extremes`."""

    def eval(self) -> object:
        """Evaluation mode, in which a forward leaves those of the last training forward alone."""

    def compile(self) -> None:
        """Compile the forward in place."""

    def __call__(
        self, tokens: Tensor, targets: Tensor | None = None, measure_entropy: bool = False
    ) -> ModelOutput:
        """`forward`, compiled if `compile` was called."""

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, measure_entropy: bool = False
    ) -> ModelOutput:
        """tokens and targets (B, T) int64, T <= context. Position t sees positions 0 to t only.

        measure_entropy: keep what `attention_entropy` and `one_hot_share` return, whatever it costs.
        """

    # What the optimizers need.
    def parameter_roles(self) -> Mapping[str, ParameterRole]:
        """The role of every parameter of `named_parameters`, by name."""

    def attention_layouts(self) -> Sequence[AttentionLayout]:
        """L layouts, first layer to last: the rows of the weights that make each head's query and key."""

    # What is measured.
    @property
    def layers(self) -> Iterable[nn.Module]:
        """The blocks, first to last. Sharded training (FSDP2) gathers the weights of one block at a time."""

    def logit_extremes(self) -> LogitRange:
        """Exact highest and lowest visible attention logit of each head, (L, H) each, of the last training forward,
        whichever kernel computed it. Raises MuonlabError before the first."""

    def bounded_logits(self, limit: float, absolute: bool) -> tuple[LogitRange, Tensor]:
        """Upper and lower bounds of `logit_extremes`, (L, H) each, and which heads' are exact, (L, H) bool.

        Must be exact for every head whose bound reaches `limit`: the bound of the highest logit, or of the largest
        magnitude if `absolute`. A model without cheap bounds returns the extremes and all True.
        """

    def attention_entropy(self) -> Tensor:
        """Mean entropy of the attention weights in nats, (L, H), of the last forward with measure_entropy."""

    def one_hot_share(self) -> Tensor:
        """Share of the attention rows with a weight above 0.95, (L, H), of the last forward with measure_entropy."""

    def watch_attention(self, look: Callable[[Tensor, Tensor], None]) -> AbstractContextManager[None]:
        """Within it, every forward calls `look(queries, keys)` once per layer, first to last.

        Queries (B, H, T, d) and keys (B, K, T, d) as the logits multiply them: normalised and rotated.
        """

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one training token, forward and backward, in sequences of `length` tokens."""


@runtime_checkable
class MixtureModel(Protocol):
    """What a CausalModel with routed experts has besides."""

    @property
    def expert_layers(self) -> Collection[int]:
        """The numbers of the layers that have experts, ascending, from 0."""

    def expert_loads(self) -> Tensor:
        """Tokens that went to each expert in the step, float (layers with experts, E): of all its micro-batches, and
        of all ranks once `update_balance` was called."""

    def measurements(self) -> Mapping[str, Tensor]:
        """0-dim tensors of the last training forward by column, `<kind>/<quantity>/<layer>`.

        How those of the ranks' equal shares of a batch make the whole's follows from the quantity: `max_*` are
        maxima, `*_norm` root mean squares, all others means. Raises MuonlabError before the first forward.
        """

    def update_balance(self) -> None:
        """End the step of the routers, after all its micro-batches: balance by the loads, and count anew."""


def as_causal_model(model: object, name: str) -> CausalModel:
    """The registered model `name`, whose members are checked. Raises MuonlabError for those that it lacks."""
    members = (member for member in vars(CausalModel) if not member.startswith("_"))
    if missing := [member for member in members if not hasattr(model, member)]:
        raise MuonlabError(
            f"model '{name}' cannot be trained: it lacks {', '.join(missing)}"
            " (muonlab.models.contract.CausalModel says what each is)"
        )
    return cast(CausalModel, model)
