"""The LightningModule: the one place where model, optimizer and data meet."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from muonlab.data import TokenData
from muonlab.errors import MuonlabError
from muonlab.models.contract import CausalModel, MixtureModel, ModelOutput, as_causal_model
from muonlab.models.max_logits import LogitRange
from muonlab.models.registry import make_model
from muonlab.optim.optimizers import OPTIMIZERS
from muonlab.settings.model import with_vocabulary
from muonlab.train.accelerator import choose_accelerator, is_compiled
from muonlab.train.config import RunConfig
from muonlab.train.schedule import SCHEDULES


class Probe(NamedTuple):
    """`loss` in nats per token; `log_partition`, the mean of log sum exp over the vocabulary, in nats; `entropy` of
    attention in nats and `one_hot` share of its rows, (layers, heads)."""

    loss: Tensor
    log_partition: Tensor
    entropy: Tensor
    one_hot: Tensor


class LanguageModel(L.LightningModule):
    """Trains `model` on batches that are a pure function of (seed, micro-batch number).

    After each training forward `logits` holds the extremes, or bounds, of its attention logits (LogitRange of
    (layers, heads)), and `exact` which heads' are exact, (layers, heads) bool, None for all.

    Automatic optimization with one optimizer object, so that Lightning's step count is the optimizer's. Raises
    MuonlabError for settings that the parts refuse.
    """

    model: CausalModel
    logits: LogitRange
    exact: Tensor | None

    def __init__(self, config: RunConfig, data: TokenData):
        super().__init__()
        self.config, self.data = config, data
        self.model = as_causal_model(make_model(_for_data(config.model, data)), config.model.name)
        self._has_experts = isinstance(self.model, MixtureModel)
        self.context: int = config.model.context
        self.batch_size = config.trainer.batch_size
        self.optimizer = OPTIMIZERS.make(config.optimizer, self.model)
        self.schedule = SCHEDULES.make(config.schedule, config.trainer.max_steps)
        tokens = config.trainer.max_steps * config.trainer.sequences / config.trainer.devices * self.context
        flops = tokens * self.model.flops_per_token(self.context)
        self.compiled = is_compiled(config.trainer, choose_accelerator(config.trainer), flops)
        if self.compiled:
            self.model.compile()

    @property
    def experts(self) -> MixtureModel | None:
        """The model, if it has routed experts."""
        return cast(MixtureModel, self.model) if self._has_experts else None

    def configure_model(self) -> None:
        """Cut every weight into the ranks' rows where the strategy has a mesh of ranks (FSDP2): block by block, so that
        at most one block's weights are whole at a time."""
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for part in (*self.model.layers, cast(torch.nn.Module, self.model)):
            fully_shard(part, mesh=mesh)
        # The parameters are other objects now; nothing has been updated yet.
        self.optimizer = OPTIMIZERS.make(self.config.optimizer, self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig | torch.optim.Optimizer:
        """One optimizer, one schedule that multiplies the learning rate of all its groups."""
        if self.trainer.world_size > 1 and self.device_mesh is None:
            self.optimizer.process_group = dist.group.WORLD
        if not any("lr" in group for group in self.optimizer.param_groups):
            return self.optimizer  # there is no rate to schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> range:
        """Micro-batch numbers; the batches themselves are computed from `batch_idx`, which a resume restores."""
        return range(self.config.trainer.max_steps * self.config.trainer.accumulate)

    def training_step(self, _: object, batch_idx: int) -> dict[str, Tensor]:
        """Cross-entropy (plus z-loss) of micro-batch `batch_idx`; its max logits go to the clip."""
        clip = self.optimizer.clip
        if clip is not None and batch_idx % self.trainer.accumulate_grad_batches == 0:
            clip.forget()  # the maxima of a step that the gradient scaler skipped
        sequential = self.config.trainer.batch_order == "sequential"
        batch = self.data.batch(self.config.seed, batch_idx, self.batch_size, self.context, sequential)
        rank, world = self.global_rank, self.trainer.world_size
        tokens, targets = (self.sent(part[rank::world]) for part in batch)
        loss, cross_entropy = _losses(self.model(tokens, targets))
        self._measure_logits(batch_idx // self.trainer.accumulate_grad_batches)
        return {"loss": loss, "cross_entropy": cross_entropy.detach()}

    def sent(self, tokens: Tensor) -> Tensor:
        """Tokens on the run's device. To a GPU from pinned memory: a copy from any other waits for the kernels queued
        before it, and the host with it."""
        if self.device.type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self.device, non_blocking=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, and the end of the routers' step.

        Once for all micro-batches of a step, by the sum of their loads. A step that the gradient scaler skips ends
        too: its gradients overflowed, but its loads are those of a forward like any other.
        """
        super().optimizer_step(*args, **kwargs)
        if (experts := self.experts) is not None:
            experts.update_balance()

    def _measure_logits(self, step: int) -> None:
        """Max logits of the forward just done: exact every `exact_every` steps, in between bounds below tau.

        A head whose bound reaches tau is measured exactly, so that the clip does the same at any cadence; a running
        average of maxima is made of all of them, and all are exact.
        """
        clip = self.optimizer.clip
        absolute = clip is not None and clip.maximum == "absolute"
        averaged = clip is not None and clip.average > 0
        if averaged or step % self.config.trainer.exact_every == 0:
            self.logits, self.exact = self.model.logit_extremes(), None
        else:
            limit = torch.inf if clip is None else clip.tau
            self.logits, self.exact = self.model.bounded_logits(limit, absolute)
        if clip is not None:
            maxima = self.logits.absolute if absolute else self.logits.highest
            self.optimizer.observe(maxima)

    def probe(self) -> Probe:
        """Measure one fixed held-out batch: free of data noise."""
        ((tokens, targets),) = self.data.eval_batches(self.config.trainer.probe_batch_size, self.context, 1)
        # forward() and not the call: the probe needs every attention weight, which a compiled step never holds. Sharded
        # weights, which no compiled step has, are whole within the call alone.
        forward = self.model.forward if self.device_mesh is None else self.model
        with self._evaluating():
            output = forward(self.sent(tokens), self.sent(targets), measure_entropy=True)
        log_partition = output.logits.float().logsumexp(-1).mean()
        entropy, one_hot = self.model.attention_entropy(), self.model.one_hot_share()
        return Probe(_losses(output)[1], log_partition, entropy, one_hot)

    def validate(self) -> Tensor:
        """Mean cross-entropy in nats per token over fixed windows spread evenly over the held-out works.

        Lightning's own validation loop is not used because its place within a step moves on a resume, and a resumed
        run must give the same rows to the bit.
        """
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        batches = self.data.eval_batches(self.batch_size, self.context, self.config.trainer.val_batches)
        with self._evaluating():
            for tokens, targets in batches:
                _, cross_entropy = _losses(self.model(self.sent(tokens), self.sent(targets)))
                total += cross_entropy.double() * targets.numel()
                count += targets.numel()
        return total / count

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.model.eval()
        with torch.no_grad(), self.optimizer.averaged(), self.trainer.precision_plugin.forward_context():
            yield
        if self.device_mesh is not None:
            cast(Any, self.model).reshard()  # FSDP2 leaves the outermost weights whole for a backward to come
        self.model.train()


def _losses(output: ModelOutput) -> tuple[Tensor, Tensor]:
    """The loss and the cross-entropy of a forward that was given targets."""
    assert output.loss is not None
    assert output.cross_entropy is not None
    return output.loss, output.cross_entropy


def _for_data(settings: Any, data: TokenData) -> Any:
    """The model's settings with the data's vocabulary where they leave it open; MuonlabError if it is too small."""
    if not hasattr(settings, "vocab_size"):
        raise MuonlabError(
            f"model '{settings.name}' has no setting vocab_size; give it one, an int or None for the tokens of the data"
        )
    settings = with_vocabulary(settings, data.vocab_size)
    if settings.vocab_size < data.vocab_size:
        raise MuonlabError(
            f"model.vocab_size={settings.vocab_size} is smaller than the {data.vocab_size} tokens of {data.name}"
        )
    return settings
