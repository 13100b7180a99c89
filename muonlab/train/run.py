"""One run from config to record: assembles data, model, optimizer, Trainer and record, and ends in one status."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from muonlab.command import tell
from muonlab.errors import EnvironmentFault, MuonlabError, system_fault
from muonlab.plugins import plugin_fault, plugin_sources
from muonlab.record import RunRecord, collect_environment
from muonlab.record.environment import Environment
from muonlab.record.files import check_folder, remove_leftovers
from muonlab.record.lease import Lease
from muonlab.record.mend import ended, is_run
from muonlab.record.store import check_uri, store_uri
from muonlab.record.stream import whole_until
from muonlab.runtime import settle
from muonlab.train.config import RunConfig
from muonlab.train.place import find_place

if TYPE_CHECKING:  # they import torch
    from muonlab.train.module import LanguageModel
    from muonlab.train.peers import Peers


@dataclass(frozen=True)
class Outcome:
    """The folder of the record, the status of the run (see STATUSES), its cause, and whether it was trained just now.

    signal: the number of the signal that interrupted it; 0: none.
    """

    folder: Path
    status: str
    cause: str = ""
    trained: bool = True
    signal: int = 0


def with_corpus(config: RunConfig) -> RunConfig:
    """The config with the digest of its text, which may need a pass over the text or its download."""
    from muonlab.data import corpus_digest

    return config if config.corpus else replace(config, corpus=corpus_digest(config.data, config.paths.cache))


def run_folder(config: RunConfig) -> Path:
    """<runs>/<name>-<identity>: the same config, text and seed have the same folder, wherever and whenever they run."""
    config = with_corpus(config)
    return Path(config.paths.runs) / f"{config.name}-{config.identity}"


def check_places(config: RunConfig) -> None:
    """Raises MuonlabError for a runs folder or MLflow address that cannot be used; imports nothing heavy."""
    check_folder(Path(config.paths.runs), "paths.runs")
    if config.tracking.name == "mlflow":
        check_uri(store_uri(config.tracking.uri, config.paths.runs), "$MLFLOW_TRACKING_URI")


def train(
    config: RunConfig,
    on_step: Callable[[int], None] | None = None,
    on_reading: Callable[[float, float], None] | None = None,
) -> Outcome:
    """Train one run, resume it where it stopped, or do nothing if it is over (unless `force`).

    A run on several devices is one process per device: those that a launcher has started, of which this is one, or else
    processes started here. `on_step` is called with the number of finished steps, `on_reading` with a step's loss and
    largest max logit (see Recording). Divergence, a size that this machine's memory cannot hold, and interruption end
    in an Outcome. Raises MuonlabError for a mistake of the user,
    before anything is recorded, and EnvironmentFault for a failure of the machine, after which the run can be resumed.
    Other exceptions are recorded as `failed` and raised again.
    """
    check_places(config)
    config = with_corpus(config)
    folder = run_folder(config)
    place = find_place(config.trainer.devices)
    alone = place is None or place.world == 1
    if alone and not config.force and (earlier := _earlier(config, folder)):
        return earlier
    if alone and config.trainer.progress:
        print(_opening(config), flush=True)
    settle(config.trainer.num_threads)
    from muonlab.train.accelerator import choose_accelerator
    from muonlab.train.trainer import refuse_huge_batches

    accelerator = choose_accelerator(config.trainer)
    refuse_huge_batches(config, accelerator)
    if place is None:
        from muonlab.train.ranks import train_on_ranks

        return train_on_ranks(config, folder, on_step, on_reading)
    from muonlab.train.peers import Peers, lost_peer, peer_fault

    peers, lost = None, False
    try:
        peers = Peers(place, accelerator)
        if not config.force and (earlier := peers.from_first(lambda: _earlier(config, folder))):
            return earlier
        if peers.first:
            remove_leftovers(folder.parent, f"{folder.name}.*")
            if config.force and is_run(folder):
                _set_aside(folder)
        return _train(config, peers, accelerator, folder, on_step, on_reading)
    except Exception as error:
        lost = lost_peer(error) or lost_peer(error.__cause__)
        if lost_peer(error):
            raise peer_fault() from error
        if isinstance(error, OSError):
            raise system_fault(error) from error
        if (fault := plugin_fault(error)) is not None:
            raise fault from error
        raise
    finally:
        if peers is not None:
            peers.part(lost)


def _train(
    config: RunConfig,
    peers: "Peers",
    accelerator: str,
    folder: Path,
    on_step: Callable[[int], None] | None,
    on_reading: Callable[[float, float], None] | None,
) -> Outcome:
    import torch

    from muonlab.data import make_data, open_corpus
    from muonlab.optim.routing import collapse_layers, format_routing
    from muonlab.train.callbacks import Health, ProgressBar, StopBetweenSteps
    from muonlab.train.checkpoints import Checkpoints, latest_checkpoint
    from muonlab.train.ending import ending_of, how_it_ended
    from muonlab.train.module import LanguageModel
    from muonlab.train.recording import Recording
    from muonlab.train.tracking import open_mlflow, open_store
    from muonlab.train.trainer import make_trainer

    corpus = open_corpus(config.data, config.paths.cache)
    if corpus.short_digest != config.corpus:
        raise MuonlabError(
            f"the text of data={config.data.name} changed while its runs were waiting: its digest is"
            f" {corpus.short_digest}, not {config.corpus}; rerun the command to train another run on the new text"
        )
    data = make_data(config.data, config.paths.cache, corpus)
    data.check_context(config.model.context)
    environment = replace(collect_environment(), data=data.describe())
    torch.manual_seed(config.seed)
    module = LanguageModel(config, data)
    shown = config.trainer.progress and peers.first
    if shown:
        print(format_routing(collapse_layers(module.optimizer.routing)), flush=True)
        if config.trainer.compile == "auto":
            print(f"trainer.compile=auto: {'compiled' if module.compiled else 'not compiled'}", flush=True)
    # A server that cannot be reached is reported before anything is recorded.
    store = open_store(config.tracking, Path(config.paths.runs)) if peers.first else None
    record = _open_record(folder, config, module, environment) if peers.first else None
    try:
        max_steps = config.trainer.max_steps
        checkpoint, torn = peers.from_first(
            lambda: latest_checkpoint(folder / "checkpoints", whole_until(folder / "traces"), max_steps)
        )
        if record is not None:
            if checkpoint is None:
                record.truncate(-1)
            _report_damage(folder, [*record.torn, *torn], checkpoint)
        mlflow_run = open_mlflow(store, config, folder, environment) if store and record else None
        recording = Recording(record, mlflow_run, on_step, on_reading)
        checkpoints = Checkpoints(folder / "checkpoints", config.trainer.checkpoint_every, recording)
        stop = StopBetweenSteps(checkpoints, peers)
        progress = [ProgressBar(recording, config.name)] if shown else []
        callbacks = [recording, Health(recording), stop, *progress, checkpoints]
        trainer = make_trainer(config.trainer, peers.place, accelerator, folder, callbacks)
        stop.install()
        try:
            try:
                trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
                ending = how_it_ended(recording.metrics)
            except BaseException as error:
                ending = ending_of(error, trainer.global_step)
            for bar in progress:
                bar.close()
            try:
                recording.finish(ending.status, ending.cause)
            except Exception as error:
                ending = ending_of(error, trainer.global_step) if ending.error is None else ending
        finally:
            stop.restore()
    finally:
        if record is not None:
            record.close()
    if ending.error is not None:
        raise ending.error
    return Outcome(folder, ending.status, ending.cause, signal=ending.signal)


def _opening(config: RunConfig) -> str:
    """What is about to run, in one line: the first that is seen, before the imports of the libraries take seconds."""
    trainer = config.trainer
    tokens = f"{trainer.sequences} x {config.model.context} tokens"
    return f"{config.name}: {config.model.name} on {config.data.name}, {trainer.max_steps} steps of {tokens}"


def _earlier(config: RunConfig, folder: Path) -> Outcome | None:
    """The outcome of a run that is over; rows that its store lacks, after a failure or a kill, are sent."""
    state = ended(folder, config.trainer.max_steps)
    if state is None:
        return None
    from muonlab.train.tracking import reconcile_mlflow

    try:
        reconcile_mlflow(config, folder)
    except EnvironmentFault as fault:
        tell(f"{fault}; the run is recorded in its folder")
    return Outcome(folder, state["status"], state["cause"], trained=False)


def _open_record(
    folder: Path, config: RunConfig, module: "LanguageModel", environment: Environment
) -> RunRecord:
    routing = [asdict(route) for route in module.optimizer.routing]
    sources = plugin_sources(config.plugins)
    if is_run(folder):
        return RunRecord.reopen(folder, config.as_dict(), routing, environment, sources)
    return RunRecord.create(folder, config.as_dict(), routing, environment, sources)


def _report_damage(folder: Path, torn: list[Path], checkpoint: Path | None) -> None:
    if torn:
        names = ", ".join(str(path.relative_to(folder)) for path in torn)
        way = f"it resumes from {checkpoint.name}" if checkpoint else "it starts again from step 0"
        tell(f"the record in {folder} was damaged: unreadable files are kept as {names}, and {way}")


def _set_aside(folder: Path) -> None:
    """Move the replaced run to <runs>/.replaced, so that nothing recorded is lost."""
    lease = Lease.take(folder)
    try:
        aside = folder.parent / ".replaced" / f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        aside.parent.mkdir(exist_ok=True)
        shutil.move(folder, aside)
        lease.moved(aside)
    finally:
        lease.release()
