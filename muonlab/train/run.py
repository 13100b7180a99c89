"""One run from config to record: assembles data, model, optimizer, Trainer and record, and ends in one status."""

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from muonlab.errors import MuonlabError
from muonlab.record import RunRecord, collect_environment, load_run, run_identity
from muonlab.runtime import settle
from muonlab.train.config import PRECISIONS, resolve, run_name

# Statuses after which the same command has nothing left to do.
OVER = ("finished", "diverged")


@dataclass(frozen=True)
class Outcome:
    """Where the record lies, how the run ended (see RunRecord), why, and whether it was trained just now."""

    folder: Path
    status: str
    cause: str = ""
    trained: bool = True


def run_folder(config: dict[str, Any]) -> Path:
    """<runs>/<name>-<identity>: the same config and seed have the same folder, wherever and whenever they run."""
    return Path(config["paths"]["runs"]) / f"{run_name(config)}-{run_identity(config)}"


def train(config: Any, on_step: Callable[[int], None] | None = None) -> Outcome:
    """Train one run, or go on with it where it was stopped, or do nothing if it is over (unless `force`).

    `config` is the composed Hydra config or an equal dict. `on_step` is told the number of finished steps. Divergence,
    running out of memory and interruption end in an Outcome; raises MuonlabError for what the user got wrong, before
    anything is recorded. Other exceptions are recorded as `failed` and raised again.
    """
    config = resolve(config)
    folder = run_folder(config)
    if (folder / "config.yaml").exists() and first_rank():
        earlier = load_run(folder)
        if config["force"]:
            _set_aside(folder)
        elif earlier.status in OVER:
            return Outcome(folder, earlier.status, earlier.cause, trained=False)
    settle(config["trainer"]["num_threads"])
    _quiet()
    return _train(config, folder, on_step)


def _train(config: dict[str, Any], folder: Path, on_step: Callable[[int], None] | None) -> Outcome:
    import torch

    from muonlab.data import build_data
    from muonlab.optim.routing import collapse_layers, format_routing
    from muonlab.train.callbacks import Diverged, Health, Interrupted, ProgressBar, StopBetweenSteps
    from muonlab.train.module import LanguageModel
    from muonlab.train.recording import Recording
    from muonlab.train.spectra import Spectra
    from muonlab.train.tracking import open_mlflow, open_store

    accelerator = _accelerator(config["trainer"])
    settings = dict(config["data"])
    data = build_data(settings.pop("name"), cache=config["paths"]["cache"], **settings)
    data.check_context(config["model"]["context"])
    environment = collect_environment() | {"data": data.describe()}
    torch.manual_seed(config["seed"])
    module = LanguageModel(config, data)
    shown = config["trainer"]["progress"] and first_rank()
    if shown:
        print(format_routing(collapse_layers(module.optimizer.routing)), flush=True)

    record = mlflow_run = None
    checkpoint = _latest_checkpoint(folder)
    if first_rank():
        store = open_store(config)  # a server that cannot be reached is told before anything is recorded
        record = _open_record(folder, config, module, environment)
        mlflow_run = open_mlflow(store, config, record, environment) if store else None
        if checkpoint is None:
            record.truncate(-1)
    recording = Recording(record, mlflow_run, on_step)
    every = config["trainer"]["spectra_every"]
    spectra = Spectra(recording, every) if every else None  # before the recording, which closes the row
    health, stop = Health(recording), StopBetweenSteps()
    progress = ProgressBar(recording, run_name(config)) if shown else None
    trainer = _trainer(config["trainer"], accelerator, folder, [spectra, recording, health, stop, progress])
    status, cause = "failed", ""
    try:
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
        status = "finished"
    except Diverged as error:
        status, cause = "diverged", str(error)
    except (Interrupted, KeyboardInterrupt) as error:
        status, cause = "interrupted", str(error) or "stopped within a step"
    except (MemoryError, RuntimeError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not _out_of_memory(error):
            raise
        status = "out-of-memory"
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        raise
    finally:
        if progress:
            progress.close()
        stop.restore()
        recording.finish(status, cause)
    return Outcome(folder, status, cause)


def first_rank() -> bool:
    """Whether this process keeps the record: with several devices Lightning starts the command once for each."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def _open_record(folder: Path, config: dict[str, Any], module: Any, environment: dict[str, Any]) -> RunRecord:
    if (folder / "config.yaml").exists():
        return RunRecord.reopen(folder, config)
    return RunRecord.create(
        folder, config, [asdict(route) for route in module.optimizer.routing], environment
    )


def _trainer(settings: dict[str, Any], accelerator: str, folder: Path, callbacks: list[Any]) -> Any:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    checkpoints = ModelCheckpoint(
        dirpath=(folder / "checkpoints").absolute(),
        filename="step-{step:08d}",
        auto_insert_metric_name=False,
        every_n_train_steps=settings["checkpoint_every"] or settings["max_steps"],
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return L.Trainer(
        accelerator=accelerator,
        devices=settings["devices"],
        strategy=settings["strategy"],
        precision=PRECISIONS[settings["precision"]],
        max_steps=settings["max_steps"],
        max_epochs=1,
        accumulate_grad_batches=settings["accumulate"],
        gradient_clip_val=settings["grad_clip"] or None,
        callbacks=[callback for callback in callbacks if callback is not None] + [checkpoints],
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def _accelerator(settings: dict[str, Any]) -> str:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = settings["device"]
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    have = gpus if device == "cuda" else os.cpu_count() or 1
    if settings["devices"] > have:
        what = "CUDA devices" if device == "cuda" else "processor cores"
        raise MuonlabError(
            f"trainer.device={settings['device']} trainer.devices={settings['devices']}: this machine has {have} {what}"
        )
    return device


def _latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read: a kill may have cut the last one short."""
    import torch

    for path in sorted((folder / "checkpoints").glob("step-*.ckpt"), reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError):
            path.unlink()
            continue
        return path
    return None


def _set_aside(folder: Path) -> None:
    """Nothing recorded is lost: the replaced run moves to <runs>/.replaced."""
    aside = folder.parent / ".replaced" / f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    aside.parent.mkdir(exist_ok=True)
    shutil.move(folder, aside)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _quiet() -> None:
    """Lightning's hints about hardware, loaders and loggers that are chosen on purpose here."""
    import lightning  # noqa: F401  (sets its own levels when it is imported)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
