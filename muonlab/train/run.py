"""One run from config to record: assembles data, model, optimizer, Trainer and record, and ends in one status."""

import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from muonlab.errors import MuonlabError
from muonlab.record import RunRecord, collect_environment, load_run
from muonlab.record.environment import Environment
from muonlab.record.files import check_folder
from muonlab.record.run import refuse_live_writer
from muonlab.record.store import check_uri, store_uri
from muonlab.runtime import memory, settle
from muonlab.train.config import PRECISIONS, RunConfig, TrainerSettings

# Statuses after which the same command has nothing left to do.
OVER = ("finished", "diverged")


@dataclass(frozen=True)
class Outcome:
    """Where the record lies, how the run ended (see RunRecord), why, and whether it was trained just now."""

    folder: Path
    status: str
    cause: str = ""
    trained: bool = True


def with_corpus(config: RunConfig) -> RunConfig:
    """The config with the digest of its text, which may take a pass over the text, or its download."""
    from muonlab.data import corpus_digest

    return config if config.corpus else replace(config, corpus=corpus_digest(config.data, config.paths.cache))


def run_folder(config: RunConfig) -> Path:
    """<runs>/<name>-<identity>: the same config, text and seed have the same folder, wherever and whenever they run."""
    config = with_corpus(config)
    return Path(config.paths.runs) / f"{config.name}-{config.identity}"


def check_places(config: RunConfig) -> None:
    """Raises MuonlabError where a run cannot be kept or shown, before anything heavy is imported."""
    check_folder(Path(config.paths.runs), "paths.runs")
    if config.tracking.name == "mlflow":
        check_uri(store_uri(config.tracking.uri, config.paths.runs), "$MLFLOW_TRACKING_URI")


def train(config: RunConfig, on_step: Callable[[int], None] | None = None) -> Outcome:
    """Train one run, or resume it where it was stopped, or do nothing if it is over (unless `force`).

    `on_step` is called with the number of finished steps. Divergence, running out of memory and interruption end in an
    Outcome; raises MuonlabError for what the user got wrong, before anything is recorded. Other exceptions are recorded
    as `failed` and raised again.
    """
    check_places(config)
    config = with_corpus(config)
    folder = run_folder(config)
    if (folder / "config.yaml").exists() and first_rank():
        if config.force:
            refuse_live_writer(folder)
            _set_aside(folder)
        elif (earlier := load_run(folder)).status in OVER:
            return Outcome(folder, earlier.status, earlier.cause, trained=False)
    settle(config.trainer.num_threads)
    _quiet()
    return _train(config, folder, on_step)


def _train(config: RunConfig, folder: Path, on_step: Callable[[int], None] | None) -> Outcome:
    import torch

    from muonlab.data import make_data, open_corpus
    from muonlab.optim.routing import collapse_layers, format_routing
    from muonlab.train.callbacks import Diverged, Health, Interrupted, ProgressBar, StopBetweenSteps
    from muonlab.train.module import LanguageModel
    from muonlab.train.recording import Recording
    from muonlab.train.spectra import Spectra
    from muonlab.train.tracking import open_mlflow, open_store

    accelerator = _accelerator(config.trainer)
    _refuse_huge_batches(config, accelerator)
    corpus = open_corpus(config.data, config.paths.cache)
    if corpus.short_digest != config.corpus:
        raise MuonlabError(
            f"the text of data={config.data.name} changed while its runs were waiting: its digest is"
            f" {corpus.short_digest}, not {config.corpus}; rerun the command, and it will be another run"
        )
    data = make_data(config.data, config.paths.cache, corpus)
    data.check_context(config.model.context)
    environment = replace(collect_environment(), data=data.describe())
    torch.manual_seed(config.seed)
    module = LanguageModel(config, data)
    shown = config.trainer.progress and first_rank()
    if shown:
        print(format_routing(collapse_layers(module.optimizer.routing)), flush=True)

    record = mlflow_run = None
    checkpoint = _latest_checkpoint(folder)
    if first_rank():
        # A server that cannot be reached is reported before anything is recorded.
        store = open_store(config.tracking, Path(config.paths.runs))
        record = _open_record(folder, config, module, environment)
        mlflow_run = open_mlflow(store, config, folder, environment) if store else None
        if checkpoint is None:
            record.truncate(-1)
    recording = Recording(record, mlflow_run, on_step)
    every = config.trainer.spectra_every
    spectra = Spectra(recording, every) if every else None  # before the recording, which closes the row
    health, stop = Health(recording), StopBetweenSteps()
    progress = ProgressBar(recording, config.name) if shown else None
    trainer = _trainer(config.trainer, accelerator, folder, [spectra, recording, health, stop, progress])
    status, cause = "failed", ""
    try:
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
        status = "finished"
        if lost := [name for name, value in recording.metrics.items() if not math.isfinite(value)]:
            status, cause = "diverged", f"{lost[0]} is {recording.metrics[lost[0]]} after the last step"
    except Diverged as error:
        status, cause = "diverged", str(error)
    except (Interrupted, KeyboardInterrupt) as error:
        status, cause = "interrupted", str(error) or "stopped within a step"
    except torch.linalg.LinAlgError as error:  # of svd, on gradients that are no longer numbers
        status, cause = "diverged", f"step {trainer.global_step}: {str(error).splitlines()[0]}"
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


def _open_record(folder: Path, config: RunConfig, module: Any, environment: Environment) -> RunRecord:
    if (folder / "config.yaml").exists():
        return RunRecord.reopen(folder, config.as_dict())
    routing = [asdict(route) for route in module.optimizer.routing]
    return RunRecord.create(folder, config.as_dict(), routing, environment)


def _trainer(settings: TrainerSettings, accelerator: str, folder: Path, callbacks: list[Any]) -> Any:
    import lightning as L
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.callbacks import ModelCheckpoint

    checkpoints = ModelCheckpoint(
        dirpath=(folder / "checkpoints").absolute(),
        filename="step-{step:08d}",
        auto_insert_metric_name=False,
        every_n_train_steps=settings.checkpoint_every or settings.max_steps,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return L.Trainer(
        accelerator=accelerator,
        devices=settings.devices,
        strategy=settings.strategy,
        precision=PRECISIONS[settings.precision],
        max_steps=settings.max_steps,
        max_epochs=1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.grad_clip or None,
        callbacks=[callback for callback in callbacks if callback is not None] + [checkpoints],
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        # A run of one process is one wherever it runs: a batch system's variables describe the job around it.
        plugins=[LightningEnvironment()] if settings.devices == 1 else None,
    )


def _accelerator(settings: TrainerSettings) -> str:
    """cpu or cuda; raises MuonlabError for devices that this machine lacks and for a precision that they lack."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = settings.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    have = gpus if device == "cuda" else os.cpu_count() or 1
    if settings.devices > have:
        what = "CUDA devices" if device == "cuda" else "processor cores"
        raise MuonlabError(
            f"trainer.device={settings.device} trainer.devices={settings.devices}: this machine has {have} {what}"
        )
    if settings.precision == "fp16" and device == "cpu":
        raise MuonlabError(
            "trainer.precision=fp16 needs a GPU, whose gradient scaler keeps small gradients; take bf16 on a CPU"
        )
    if settings.compile and device == "cpu":
        _require_compiler()
    return device


def _refuse_huge_batches(config: RunConfig, accelerator: str) -> None:
    """Raises MuonlabError for a batch of which the machine's memory cannot hold the least that every model keeps: its
    tokens and, on a CPU, a layer's input in two bytes a number."""
    model, trainer = config.model, config.trainer
    width = getattr(model, "d_model", 1) * getattr(model, "num_layers", 1) if accelerator == "cpu" else 0
    for key in ("batch_size", "probe_batch_size"):
        needed = getattr(trainer, key) * getattr(model, "context", 1) * (16 + 2 * width)
        if needed > memory():
            raise MuonlabError(
                f"trainer.{key}={getattr(trainer, key)} of model.context={model.context} needs more than"
                f" {needed / 1e9:,.0f} GB, and the machine has {memory() / 1e9:,.0f} GB of memory; more sequences a"
                " step fit with trainer.accumulate"
            )


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise MuonlabError(
            "trainer.compile=true needs a C++ compiler on this CPU, and none was found; install g++ or name one in $CXX"
        ) from None


def _latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read: a kill may have cut the last one short."""
    import torch

    for path in sorted((folder / "checkpoints").glob("step-*.ckpt"), reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, UnpicklingError):
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
