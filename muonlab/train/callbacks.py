"""Callbacks that watch a run: its health, signals that stop it, and the progress bar."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import lightning as L

from muonlab.optim.ranks import whole
from muonlab.progress import Progress
from muonlab.train.checkpoints import Checkpoints, at_end
from muonlab.train.peers import Peers
from muonlab.train.recording import Recording

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


Handler = Callable[[int, FrameType | None], object] | int | None
"""What signal.getsignal returns."""


class Diverged(Exception):
    """The loss is not finite; the text says at which step."""


class Interrupted(Exception):
    """The user or the machine asked the run to stop, with the signal `number`; it stopped between two steps."""

    def __init__(self, text: str, number: int = signal.SIGINT):
        super().__init__(text)
        self.number = number


class Health(L.Callback):
    """Stops a run whose weights are not finite when it begins, or whose loss is not finite.

    On the CPU every step is checked; on a GPU every 25th, because a check makes the host wait for the device. Damage by
    the last update shows in the final metrics.
    """

    def __init__(self, recording: Recording):
        self.recording = recording

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raises Diverged for weights that are not finite before the first step."""
        if trainer.global_step:
            return
        for name, parameter in module.named_parameters():
            if not whole(parameter.detach().isfinite().all()):
                raise Diverged(f"{name} is not finite before the first step")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Raises Diverged after the step's row is written, in all processes of a run at once."""
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or (module.device.type != "cpu" and step % 25):
            return
        loss = self.recording.latest["loss"].item()  # the mean over micro-batches and processes
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {step - 1}")


class StopBetweenSteps(L.Callback):
    """Stops a run after the current step, with a checkpoint, when a signal asks for it; at once at a second Ctrl-C.

    The signals are SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1, by which batch systems
    announce the end of a job. A run that has done its last step finishes normally. Whichever process of a run gets the
    signal, all stop after the same step. In force from `install` to `restore`.
    """

    def __init__(self, checkpoints: Checkpoints, peers: Peers) -> None:
        self.checkpoints, self.peers = checkpoints, peers
        self.asked = 0
        self._old: dict[int, Handler] = {}
        self._hook = sys.unraisablehook

    def install(self) -> None:
        """Install the handlers, if this is the main thread of the process."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if (old := signal.getsignal(number)) is not signal.SIG_IGN:  # as SIGHUP is under nohup
                    signal.signal(number, self._ask)
                    self._old.setdefault(number, old)
            sys.unraisablehook = self._lost

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take over from Lightning, whose own handlers end a run without a checkpoint; stop here if already asked."""
        self.install()
        if self._all_asked():
            raise Interrupted(f"{self._name} before step {trainer.global_step}", self.asked)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again = self.asked == number == signal.SIGINT
        self.asked = self.asked or number
        if again:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # Not KeyboardInterrupt, for which Lightning exits by itself.
            raise Interrupted(f"{self._name} within a step", self.asked)

    def _lost(self, lost: "sys.UnraisableHookArgs") -> None:
        """A second Ctrl-C while Python collects garbage cannot end the step; the run stops after it."""
        if not isinstance(lost.exc_value, Interrupted):
            self._hook(lost)

    def _all_asked(self) -> bool:
        """Whether any process was asked to stop; all are then. A signal that arrives meanwhile counts next time."""
        asked = self.peers.largest(self.asked)
        if asked:
            self.asked = asked
        return bool(asked)

    @property
    def _name(self) -> str:
        return signal.Signals(self.asked).name

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save and stop, if asked and if a whole optimizer step is done."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or at_end(trainer):
            return
        if self._all_asked():
            self.checkpoints.save(trainer)
            raise Interrupted(f"{self._name} after step {trainer.global_step - 1}", self.asked)

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
        sys.unraisablehook = self._hook


class ProgressBar(L.Callback):
    """One bar: steps, time left, loss, max logit, tokens per second. Reads the device at most four times a second."""

    def __init__(self, recording: Recording, label: str):
        self.recording, self.label = recording, label

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A resumed run's bar starts where it left off."""
        terminal = sys.stderr.isatty()
        self.bar = Progress(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc=self.label,
            unit="step",
            mininterval=0.25 if terminal else 15,
            dynamic_ncols=terminal,
        )
        self.shown, self.first_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Advance the bar; refresh its numbers if they are due."""
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
        """Close the bar and leave its last state on the screen."""
        if hasattr(self, "bar"):
            self.bar.close()
