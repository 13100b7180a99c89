"""What watches a run: its health, the user's Ctrl-C, and the one progress bar."""

import math
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning as L
from tqdm import tqdm

from muonlab.train.recording import Recording, checkpoint_path


class Diverged(Exception):
    """The loss is no longer a number; the text says at which step."""


class Interrupted(Exception):
    """The user or the machine asked the run to stop; it stopped between two steps."""


class Health(L.Callback):
    """Stops a run whose loss is not finite.

    On the CPU every step is looked at; on a GPU every 25th, because a look makes the host wait for the device.
    """

    def __init__(self, recording: Recording):
        self.recording = recording

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raises Diverged after the step's row is written."""
        if module.device.type != "cpu" and (batch_idx + 1) % 25:
            return
        loss = outputs["cross_entropy"].item()
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {batch_idx // trainer.accumulate_grad_batches}")


class StopBetweenSteps(L.Callback):
    """Ctrl-C and SIGTERM end the run after the current step, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked: str = ""
        self._old: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take over the signals, where this is the main thread of a process."""
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked == name == "SIGINT":
            raise KeyboardInterrupt
        self.asked = self.asked or name

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if asked and if a whole optimizer step is done."""
        if self.asked and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(checkpoint_path(trainer))
            raise Interrupted(f"{self.asked} after step {trainer.global_step - 1}")

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


class ProgressBar(L.Callback):
    """One bar: steps, time left, loss, max logit, tokens per second. Reads the device four times a second at most."""

    def __init__(self, recording: Recording, label: str):
        self.recording, self.label = recording, label

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A resumed run's bar starts where it left off."""
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc=self.label,
            unit="step",
            mininterval=0.25 if terminal else 15,
            dynamic_ncols=terminal,
        )
        self.shown, self.first_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on; refresh the numbers if it is time."""
        now = time.monotonic()
        if now - self.shown > self.bar.mininterval and self.recording.latest:
            self.shown = now
            elapsed = max(now - self.recording.started, 1e-9)
            rate = (trainer.global_step - self.first_step) * self.recording.tokens_per_step / elapsed
            latest = self.recording.latest
            self.bar.set_postfix_str(
                f"loss {latest['loss']:.3f}, max logit {latest['max_logit'].max():.0f}, {rate:,.0f} tokens/s",
                refresh=False,
            )
        self.bar.update(trainer.global_step - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if hasattr(self, "bar"):
            self.bar.close()
