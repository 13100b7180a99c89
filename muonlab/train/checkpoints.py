"""Checkpoints: written whole, two kept, and verified by their content when a run resumes."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from muonlab.errors import EnvironmentFault
from muonlab.record.files import set_aside, write_atomic
from muonlab.train.recording import Recording

# The last one, and the one before it should the last turn out torn.
KEPT = 2
# The keys of every checkpoint: Lightning's, and the state of the recording.
CONTENT = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "muonlab")


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and moves it into place: no kill or full disk leaves half of one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Raises EnvironmentFault where the folder cannot be written."""
        write_atomic(Path(path), lambda temporary: _save(checkpoint, temporary))


class Checkpoints(Checkpoint):
    """Saves every `every` steps (0: never) into `folder`, and at the end of the run, with its final metrics.

    The record is flushed before, and its rows are sent to MLflow after, so that MLflow never shows a row that a resumed
    run would compute again. `folder` keeps the two newest.
    """

    def __init__(self, folder: Path, every: int, recording: Recording):
        self.folder, self.every, self.recording = folder, every, recording

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save at the cadence; the last step's waits for the final metrics."""
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and self.every and trainer.global_step % self.every == 0 and not at_end(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save the end of the run."""
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save the steps done so far, and remove all but the two newest."""
        trainer.save_checkpoint(checkpoint_path(self.folder, trainer.global_step), weights_only=False)
        self.recording.send()
        if trainer.is_global_zero:
            _remove_older(self.folder, trainer.global_step)
            if at_end(trainer):  # those of steps beyond a torn trace, from which the run has come back here
                for step in _steps(self.folder):
                    if step > trainer.global_step:
                        checkpoint_path(self.folder, step).unlink(missing_ok=True)


def at_end(trainer: L.Trainer) -> bool:
    """Whether the last step is done."""
    return trainer.max_steps is not None and trainer.global_step >= trainer.max_steps


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the first `step` steps."""
    return folder / f"step-{step:08d}.ckpt"


def latest_checkpoint(folder: Path, recorded: int, max_steps: int) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that a run can resume from, and those that were set aside as torn.

    folder: where the checkpoints are. recorded: the last step up to which the traces are whole, -1 for none;
    checkpoints of later steps are skipped. One of the last step counts only with its final metrics. A file that its
    checksums or missing keys prove torn is renamed to `*.torn`; older checkpoints that a killed process left behind are
    removed. Raises EnvironmentFault where a file cannot be read or does not fit in memory, which proves nothing.
    """
    torn = []
    for step in sorted(_steps(folder), reverse=True):
        if step > recorded + 1:
            continue
        path = checkpoint_path(folder, step)
        content = _content(path, step)
        if content is None:
            torn.append(set_aside(path))
        elif step < max_steps or content["muonlab"].get("metrics"):
            _remove_older(folder, step)
            return path, torn
    return None, torn


def _content(path: Path, step: int) -> dict[str, Any] | None:
    """The content of the checkpoint of `step` steps, with its tensors still on disk; None if it is torn or not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, EOFError):
        return None
    except (OSError, MemoryError) as error:
        raise EnvironmentFault(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except RuntimeError as error:
        if "alloc" in str(error):  # no memory for a file whose checksums are right
            raise EnvironmentFault(f"cannot read {path}: {str(error).splitlines()[0]}") from error
        return None
    except Exception:  # whatever a pickle of something else raises
        return None
    whole = isinstance(content, dict) and all(key in content for key in CONTENT)
    return (
        content if whole and isinstance(content["muonlab"], dict) and content["global_step"] == step else None
    )


def _remove_older(folder: Path, newest: int) -> None:
    """Remove those up to `newest` steps, but for the KEPT last ones."""
    for step in sorted(step for step in _steps(folder) if step <= newest)[:-KEPT]:
        checkpoint_path(folder, step).unlink(missing_ok=True)


def _steps(folder: Path) -> list[int]:
    numbers = [path.stem.removeprefix("step-") for path in folder.glob("step-*.ckpt")]
    return [int(number) for number in numbers if number.isdecimal()]


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    # torch.save ends with the message of a C++ assertion, and no errno, where a disk is full.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with path.open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
