"""The callback that writes a run's record: what happened at every step, with no host synchronisation in the step."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from muonlab.data import bits_per_byte
from muonlab.models.contract import MixtureModel
from muonlab.optim.sharded import whole
from muonlab.record import OVER, RunRecord
from muonlab.record.mlflow_run import MlflowRun
from muonlab.train.module import LanguageModel


class Recording(L.Callback):
    """Appends one row a step to the record and passes the rows on to MLflow behind every checkpoint.

    Row `step` (from 0) holds the loss, gradient norm, learning rate and max logits of that step's forward and
    backward, and the clip factors applied after its update; at their cadence `probe_loss`, `val_loss` and the
    attention entropy of the weights before the update. `on_step` is called with the number of finished steps.
    `record` is None on every rank but the first, which then only lends its losses and maxima.
    """

    def __init__(
        self,
        record: RunRecord | None,
        mlflow_run: MlflowRun | None,
        on_step: Callable[[int], None] | None = None,
    ):
        self.record, self.mlflow_run, self.on_step = record, mlflow_run, on_step
        self.seconds_before = 0.0
        self.row: dict[str, Tensor | float] = {}
        self.heads: dict[str, Tensor] = {}
        self.loads: dict[int, Tensor] = {}
        self.losses: list[Tensor] = []
        self.weights_before: list[Tensor] = []
        self.latest: dict[str, Tensor] = {}
        self.metrics: dict[str, float] = {}
        self.sent = -1  # the last step that MLflow was given
        self._random_state: Tensor | None = None

    # ------------------------------------------------------------------ one step
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock; a resumed run gets its random state back after everything else drew from it."""
        assert isinstance(module, LanguageModel)
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None
        self.started = time.monotonic()
        self.tokens_per_step = module.batch_size * module.context * trainer.accumulate_grad_batches
        self.flops_per_step = self.tokens_per_step * module.model.flops_per_token(module.context)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At their cadences: validation; the probe, with a copy of the weights to know the update's size."""
        assert isinstance(module, LanguageModel)
        if batch_idx % trainer.accumulate_grad_batches:
            return
        settings = module.config.trainer
        if settings.val_every and trainer.global_step % settings.val_every == 0:
            self.row["val_loss"] = module.validate()
        if settings.probe_every and trainer.global_step % settings.probe_every == 0:
            self.row["probe_loss"], self.heads["entropy"], self.heads["one_hot"] = module.probe()
            self.weights_before = [p.detach().clone() for _, p in module.model.named_parameters()]

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        """Gradient norm before clipping, and the learning rate of this very update."""
        assert isinstance(module, LanguageModel)
        # Read from the groups: a walk over the modules takes as long as the norms.
        groups = module.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        self.row["grad_norm"] = whole(torch.nn.utils.get_total_norm(gradients))
        # The rate that groups have unless they were given one of their own, or a factor (lr_scale).
        self.row["lr"] = module.optimizer.defaults["lr"] * module.schedule(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the row when the last micro-batch of the step is through."""
        assert isinstance(module, LanguageModel)
        self._raise("max_logit", module.logits.highest)
        self._raise("max_logit_abs", module.logits.absolute)
        if module.exact is not None:
            # A step's maximum is exact where those of all its micro-batches are; ranks decide each for themselves.
            self.heads["exact"] = (
                self.heads["exact"] & module.exact if "exact" in self.heads else module.exact
            )
        self.losses.append(outputs["cross_entropy"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        loss = torch.stack(self.losses).mean() if len(self.losses) > 1 else self.losses[0]
        if trainer.world_size > 1:
            loss = trainer.strategy.reduce(loss, reduce_op="mean")
            for key in ("max_logit", "max_logit_abs"):
                self.heads[key] = trainer.strategy.reduce(self.heads[key], reduce_op="max")
            if module.exact is not None:
                inexact = trainer.strategy.reduce((~self.heads["exact"]).float(), reduce_op="max")
                self.heads["exact"] = inexact == 0
        if (gammas := module.optimizer.gammas()) is not None:
            self.heads["gamma"] = gammas
        if (experts := module.experts) is not None:
            self._look_at_experts(trainer, experts)
        if self.weights_before:
            self.row |= self._group_sizes(module)
            self.weights_before = []
        self.row |= {
            "train_loss": loss,
            "tokens": step * self.tokens_per_step,
            "flops": step * self.flops_per_step,
            "seconds": self.seconds_before + time.monotonic() - self.started,
        }
        self.latest = {"loss": loss, "max_logit": self.heads["max_logit"]}
        if self.record is not None:
            self.record.append(step - 1, self.row, self.heads, self.loads)
        self.row, self.heads, self.loads, self.losses = {}, {}, {}, []
        if self.on_step:
            self.on_step(step)

    def _raise(self, key: str, value: Tensor) -> None:
        # The step's maximum is that over its micro-batches.
        self.heads[key] = torch.maximum(self.heads[key], value) if key in self.heads else value

    def _look_at_experts(self, trainer: L.Trainer, model: MixtureModel) -> None:
        """Loads at every step; what takes a pass over activations with the probe."""
        loads = model.expert_loads()  # of all micro-batches and ranks: the step has ended
        self.loads = dict(zip(model.expert_layers, loads / loads.sum(-1, keepdim=True), strict=True))
        if self.weights_before:
            measured = dict(model.measurements())
            if trainer.world_size > 1:
                measured = _of_all_ranks(trainer.strategy, measured)
            self.row |= measured

    def _group_sizes(self, module: LanguageModel) -> dict[str, Tensor]:
        """Root mean square of this step's change and of the weights, by optimizer group."""
        change: dict[str, list[Tensor]] = defaultdict(list)
        weight: dict[str, list[Tensor]] = defaultdict(list)
        count: dict[str, int] = defaultdict(int)
        groups = {route.name: route.group for route in module.optimizer.routing}
        for (name, parameter), before in zip(
            module.model.named_parameters(), self.weights_before, strict=True
        ):
            group = groups[name]
            change[group].append(whole((parameter.detach() - before).square().sum()))
            weight[group].append(whole(parameter.detach().square().sum()))
            count[group] += parameter.numel()
        sizes = {f"update_rms/{g}": (torch.stack(change[g]).sum() / count[g]).sqrt() for g in count}
        return sizes | {f"weight_rms/{g}": (torch.stack(weight[g]).sum() / count[g]).sqrt() for g in count}

    # ------------------------------------------------------------------ keeping it
    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Final metrics, while the model still is on its device; the checkpoint of the last step keeps them."""
        assert isinstance(module, LanguageModel)
        val_loss, probe_loss = module.validate().item(), module.probe().loss
        self.metrics = {
            "val_loss": val_loss,
            "val_bits_per_byte": bits_per_byte(val_loss, module.data.bytes_per_token),
            "probe_loss": probe_loss.item(),
        }

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint and the record on disk always agree: both hold the steps before `global_step`."""
        if self.record is not None:
            self.record.flush()
        checkpoint["muonlab"] = {
            "seconds": self.seconds_before + time.monotonic() - self.started,
            "random_state": torch.get_rng_state(),
            "metrics": self.metrics,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Rows written after the checkpoint are dropped: they will be computed again, to the same bits."""
        if self.record is not None:
            self.record.truncate(checkpoint["global_step"] - 1)
            self.send()  # what a kill kept from MLflow; it skips what it has
        kept = checkpoint["muonlab"]
        self.seconds_before, self._random_state = kept["seconds"], kept["random_state"]
        self.metrics = kept.get("metrics", {})

    def send(self) -> None:
        """Pass the rows on disk on to MLflow: those that a checkpoint covers, which no resume computes again."""
        if self.record is not None and self.mlflow_run is not None:
            for rows in self.record.rows(after=self.sent):
                self.mlflow_run.log_rows(rows)
                self.sent = int(rows[-1]["step"])

    def finish(self, status: str, cause: str) -> None:
        """End the record and the MLflow run, whatever happened."""
        if self.record is None:
            return
        metrics = self.metrics if status == "finished" else {}
        self.record.finish(status, cause, metrics)
        if self.mlflow_run is not None:
            if status in OVER:
                self.send()
            self.mlflow_run.log_folder(self.record.folder)
            self.mlflow_run.finish(status, cause, metrics)


def _of_all_ranks(strategy: Any, measured: dict[str, Tensor]) -> dict[str, Tensor]:
    """Measurements of the ranks' equal shares of a batch as those of the whole: `*/max_*` are maxima, `*/*_norm` root
    mean squares, all others means."""
    values = torch.stack([*measured.values()])
    mean, squares, highest = (
        strategy.reduce(part, reduce_op=op)
        for part, op in ((values.clone(), "mean"), (values.square(), "mean"), (values.clone(), "max"))
    )
    combined = {}
    for i, name in enumerate(measured):
        quantity = name.split("/")[1]
        combined[name] = (
            highest[i]
            if quantity.startswith("max_")
            else squares[i].sqrt()
            if quantity.endswith("_norm")
            else mean[i]
        )
    return combined
