"""The recorded columns of a step come from providers: each is a name, a moment, a cadence and a function.

A new column is one function with `@provider` in columns.py, spectra.py or a file that recording.py imports. No provider
reads what another returned, so their order does not matter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import lightning as L
import torch
from torch import Tensor

from muonlab.models.max_logits import LogitRange
from muonlab.train.config import TrainerSettings
from muonlab.train.module import LanguageModel

Moment = Literal["start", "gradients", "end"]
"""Before the step's first forward; with its whole gradients, before they are clipped; after the update."""


@dataclass
class Columns:
    """Values of one step. They are kept as references until the record is flushed, so they must not be written to.

    scalars: by column, `quantity` or `quantity/part`.
    heads: (layers, heads), by one of the names in muonlab.record.columns.HEADS.
    loads: (experts,) by the number of the layer.
    """

    scalars: dict[str, Tensor | float] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)

    def add(self, other: "Columns") -> None:
        """Add the values of another provider."""
        self.scalars |= other.scalars
        self.heads |= other.heads
        self.loads |= other.loads


@dataclass
class Step:
    """The context of a provider: one optimizer step, with all its micro-batches.

    number: from 0.
    recorded: whether this process writes the record; of several ranks the first does.
    tokens, flops: of one step, over all ranks.
    seconds: a clock of the training so far, earlier sessions included.
    weights_before: copies of the parameters from before the update, by name; empty unless a provider of this step
        compares them. Sharded as the parameters are.
    losses: the cross-entropy of each micro-batch so far, on this rank.
    logits: extremes or bounds over the micro-batches so far, (layers, heads); None before the first.
    exact: which heads' are exact in every micro-batch, (layers, heads) bool; None for all.
    """

    number: int
    trainer: L.Trainer
    module: LanguageModel
    recorded: bool
    tokens: int
    flops: float
    seconds: Callable[[], float]
    weights_before: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    logits: LogitRange | None = None
    exact: Tensor | None = None
    columns: Columns = field(default_factory=Columns)

    def add_micro_batch(self, cross_entropy: Tensor, logits: LogitRange, exact: Tensor | None) -> None:
        """Add the results of one micro-batch's forward."""
        self.losses.append(cross_entropy)
        if self.logits is None:
            self.logits, self.exact = logits, exact
            return
        highest = torch.maximum(self.logits.highest, logits.highest)
        self.logits = LogitRange(highest, torch.minimum(self.logits.lowest, logits.lowest))
        if exact is not None:
            self.exact = exact if self.exact is None else self.exact & exact

    def over_ranks(self, value: Tensor, operation: Literal["mean", "max"]) -> Tensor:
        """The mean or maximum of every rank's value; the value itself where there is one rank."""
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value, reduce_op=operation)


Measure = Callable[[Step], Columns]
Cadence = Callable[[TrainerSettings], int]


@dataclass(frozen=True)
class Provider:
    """One thing that is recorded.

    every: steps from one measurement to the next, counted from step 0; 0: never.
    compares_weights: whether `measure` reads `weights_before`.
    """

    name: str
    measure: Measure
    at: Moment
    every: Cadence
    compares_weights: bool

    def due(self, step: Step) -> bool:
        """Whether it measures at this step."""
        every = self.every(step.module.config.trainer)
        return every > 0 and step.number % every == 0


PROVIDERS: list[Provider] = []


def provider(
    name: str, *, at: Moment = "end", every: Cadence = lambda _: 1, compares_weights: bool = False
) -> Callable[[Measure], Measure]:
    """Decorator that registers a function of the step; see Provider."""

    def add(measure: Measure) -> Measure:
        PROVIDERS.append(Provider(name, measure, at, every, compares_weights))
        return measure

    return add


def due(step: Step) -> list[Provider]:
    """The providers that measure at this step."""
    return [entry for entry in PROVIDERS if entry.due(step)]
