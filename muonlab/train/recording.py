"""The callback that writes a run's record of every step, without host synchronisation within the step."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from muonlab.data import bits_per_byte
from muonlab.record import OVER, RunRecord
from muonlab.record.mlflow_run import MlflowRun
from muonlab.train import columns, spectra  # noqa: F401  they register their providers
from muonlab.train.module import LanguageModel
from muonlab.train.providers import Moment, Step, due

# Seconds between two readings of the device for `on_reading`, each of which waits for it.
READING = 1.0


class Recording(L.Callback):
    """Appends one row per step to the record and sends the rows to MLflow after every checkpoint.

    Row `step` (from 0) holds the columns of the providers that are due (providers.py): among them the loss, gradient
    norm, learning rate and max logits of that step's forward and backward, and the clip factors applied after its
    update. `on_step` is called with the number of finished steps; before it, once in READING seconds, `on_reading` with
    the step's training loss (nats) and largest max logit. `record` is None on every rank but the first; the others only
    contribute their losses and maxima.
    """

    def __init__(
        self,
        record: RunRecord | None,
        mlflow_run: MlflowRun | None,
        on_step: Callable[[int], None] | None = None,
        on_reading: Callable[[float, float], None] | None = None,
    ):
        self.record, self.mlflow_run = record, mlflow_run
        self.on_step, self.on_reading = on_step, on_reading
        self.read = -math.inf  # when the device was last read for `on_reading`
        self.seconds_before = 0.0
        self.latest: dict[str, Tensor] = {}
        self.metrics: dict[str, float] = {}
        self.sent = -1  # the last step sent to MLflow
        self._random_state: Tensor | None = None

    # ------------------------------------------------------------------ one step
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock; a resumed run restores its random state last, after everything else has drawn from it."""
        assert isinstance(module, LanguageModel)
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None
        self.started = time.monotonic()
        self.tokens_per_step = module.batch_size * module.context * trainer.accumulate_grad_batches
        self.flops_per_step = self.tokens_per_step * module.model.flops_per_token(module.context)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Open the row before the first micro-batch of a step."""
        assert isinstance(module, LanguageModel)
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self.step = Step(
            trainer.global_step,
            trainer,
            module,
            recorded=self.record is not None,
            tokens=self.tokens_per_step,
            flops=self.flops_per_step,
            seconds=self._seconds,
        )
        self._measure("start")
        if any(provider.compares_weights for provider in due(self.step)):
            weights = module.model.named_parameters()
            self.step.weights_before = {name: weight.detach().clone() for name, weight in weights}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: object
    ) -> None:
        """The gradients are complete and not yet clipped."""
        self._measure("gradients")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Close the row after the last micro-batch of the step."""
        assert isinstance(module, LanguageModel)
        assert isinstance(outputs, Mapping)
        self.step.add_micro_batch(outputs["cross_entropy"], module.logits, module.exact)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._measure("end")
        row = self.step.columns
        loss = row.scalars["train_loss"]
        assert isinstance(loss, Tensor)
        self.latest = {"loss": loss, "max_logit": row.heads["max_logit"]}
        if self.record is not None:
            self.record.append(self.step.number, row.scalars, row.heads, row.loads)
        if self.on_reading and time.monotonic() - self.read >= READING:
            self.on_reading(loss.item(), self.latest["max_logit"].max().item())
            self.read = time.monotonic()
        if self.on_step:
            self.on_step(trainer.global_step)

    def _measure(self, moment: Moment) -> None:
        for provider in due(self.step):
            if provider.at == moment:
                self.step.columns.add(provider.measure(self.step))

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    # ------------------------------------------------------------------ keeping it
    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Final metrics, while the model is still on its device; the checkpoint of the last step keeps them."""
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
            "seconds": self._seconds(),
            "random_state": torch.get_rng_state(),
            "metrics": self.metrics,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Rows written after the checkpoint are dropped: they will be computed again, to the same bits."""
        if self.record is not None:
            self.record.truncate(checkpoint["global_step"] - 1)
            self.send()  # rows that a kill kept from MLflow; it skips those it has
        kept = checkpoint["muonlab"]
        self.seconds_before, self._random_state = kept["seconds"], kept["random_state"]
        self.metrics = kept.get("metrics", {})

    def send(self) -> None:
        """Send the rows on disk to MLflow: a checkpoint covers them, so no resume computes them again."""
        if self.record is not None and self.mlflow_run is not None:
            for rows in self.record.rows(after=self.sent):
                self.mlflow_run.log_rows(rows)
                self.sent = int(rows[-1]["step"])

    def finish(self, status: str, cause: str) -> None:
        """End the record and the MLflow run with any status."""
        if self.record is None:
            return
        metrics = self.metrics if status == "finished" else {}
        self.record.finish(status, cause, metrics)
        if self.mlflow_run is not None:
            if status in OVER:
                self.send()
            self.mlflow_run.log_folder(self.record.folder)
            self.mlflow_run.finish(status, cause, metrics)
