"""The Lightning Trainer of a run: its devices, and the features of Lightning that are switched off."""

import logging
import warnings
from pathlib import Path

import lightning as L

from muonlab.errors import MuonlabError
from muonlab.runtime import memory
from muonlab.train.checkpoints import WholeFiles
from muonlab.train.config import RunConfig, TrainerSettings
from muonlab.train.place import Place
from muonlab.train.strategy import make_strategy


def make_trainer(
    settings: TrainerSettings, place: Place, accelerator: str, folder: Path, callbacks: list[L.Callback]
) -> L.Trainer:
    """The Trainer of the run in `folder`; checkpoints come from our own callback."""
    _quiet()
    shared = make_strategy(settings, place)
    return L.Trainer(
        accelerator=accelerator,
        devices=settings.devices,
        num_nodes=shared.num_nodes,
        strategy=shared.strategy,
        precision=shared.precision,
        max_steps=settings.max_steps,
        max_epochs=1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.grad_clip or None,
        callbacks=callbacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        plugins=[WholeFiles(), *shared.plugins],
    )


def refuse_huge_batches(config: RunConfig, accelerator: str) -> None:
    """Raises MuonlabError for a batch whose bare minimum exceeds the machine's memory: its tokens and, on a CPU, the
    input of every layer at two bytes per number."""
    model, trainer = config.model, config.trainer
    width = getattr(model, "d_model", 1) * getattr(model, "num_layers", 1) if accelerator == "cpu" else 0
    for key in ("batch_size", "probe_batch_size"):
        needed = getattr(trainer, key) * getattr(model, "context", 1) * (16 + 2 * width)
        if needed > memory():
            raise MuonlabError(
                f"trainer.{key}={getattr(trainer, key)} of model.context={model.context} needs more than"
                f" {needed / 1e9:,.0f} GB, and the machine has {memory() / 1e9:,.0f} GB of memory; for more"
                " sequences per step raise trainer.accumulate"
            )


def _quiet() -> None:
    """Silence Lightning's hints about hardware, loaders and loggers, which are deliberate here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
