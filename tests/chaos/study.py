"""The study under test: its commands, the places of its files, and its twin that nobody disturbs."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import IO, Literal

from chaos.processes import MARK

ROOT = Path(__file__).resolve().parents[2]
NAME = "chaos"
STEPS = 80
LAST_CHECKPOINT = f"step-{STEPS:08d}.ckpt"
RUN = [
    "data=synthetic",
    "data.train_tokens=20000",
    "data.val_tokens=4000",
    "model=nanogpt_xxs",
    "model.context=16",
    "model.d_model=16",
    "model.num_layers=1",
    "trainer.batch_size=4",
    "trainer.probe_batch_size=4",
    f"trainer.max_steps={STEPS}",
    "trainer.checkpoint_every=10",
    "trainer.val_every=40",
    "trainer.val_batches=2",
    "trainer.probe_every=10",
    "schedule.warmup=2",
]
# Rates of AdamW at which a loss is no longer a number after a few steps: these settings diverge, here and in the twin.
TOO_LARGE = "search.optimizers.adamw.space.lr=interval(1e-3, 1e30)"
EXPERIMENT = "fused_qkv"  # 24 runs without a search


@dataclass(frozen=True)
class Plan:
    """command: which one carries out the study. storage: of its queue. server: whether it tracks to an MLflow server,
    not to a file. worker: whether `python -m muonlab.worker` helps. trials, seeds: of each of a sweep's optimizers.
    clip: whether they are AdamW, Muon and MuonClip, or the first two."""

    command: Literal["sweep", "experiment"] = "sweep"
    storage: Literal["journal", "sqlite"] = "journal"
    server: bool = False
    worker: bool = False
    trials: int = 4
    seeds: int = 2
    clip: bool = True

    @property
    def optimizers(self) -> int:
        """How many a sweep compares."""
        return 3 if self.clip else 2

    @property
    def slots(self) -> int:
        """The slots of the whole study; beyond the best learning rate, a sweep has five for each of two seeds."""
        if self.command == "experiment":
            return 24
        return self.optimizers * (self.trials + self.seeds + 5 * min(2, self.seeds))

    @property
    def runs(self) -> int:
        """The runs of the whole study: of a sweep's five slots beyond the best rate, two are runs of others."""
        if self.command == "experiment":
            return 24
        return self.optimizers * (self.trials + self.seeds + 3 * min(2, self.seeds))

    def __str__(self) -> str:
        tracking = "an MLflow server" if self.server else "a file"
        return (
            f"{self.command}, {self.storage}, tracked to {tracking}{', with a worker' if self.worker else ''}"
        )


SHORT = Plan(trials=1, seeds=1, clip=False)


def draw_plan(random: Random) -> Plan:
    """One of the ways to start a study of 24 runs."""
    if random.random() < 0.3:
        return Plan("experiment", worker=random.random() < 0.4, server=random.random() < 0.15)
    storage: Literal["journal", "sqlite"] = "sqlite" if random.random() < 0.25 else "journal"
    return Plan("sweep", storage, random.random() < 0.2, random.random() < 0.4)


@dataclass(frozen=True)
class Places:
    """Where a study keeps what it writes: all on `disk`, but for what its commands print, which goes to `output`."""

    disk: Path
    output: Path

    @property
    def runs(self) -> Path:
        """A folder a run, and the MLflow store."""
        return self.disk / "runs"

    @property
    def study(self) -> Path:
        """The study's folder."""
        return self.disk / "studies" / (NAME if (self.disk / "studies" / NAME).exists() else EXPERIMENT)

    @property
    def temporary(self) -> Path:
        """$TMPDIR of its processes."""
        return self.disk / "temporary"

    @property
    def queue(self) -> Path:
        """The database of the queue, where it is not a journal."""
        return self.disk / "queue.db"

    @property
    def clock(self) -> Path:
        """The file by which the clock is moved."""
        return self.output / "clock"

    @property
    def tracking(self) -> Path:
        """MLflow's database, whether a server has it or not."""
        served = self.output / "mlflow.db"
        return served if served.exists() else self.runs / "mlflow.db"

    def make(self) -> None:
        """The folders that have to be there."""
        for folder in (self.disk, self.output, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)


def command_line(plan: Plan, places: Places, port: int | None) -> list[str]:
    """The study's command; `port` is that of its MLflow server."""
    runs = [*RUN, f"paths.runs={places.runs}", f"paths.cache={places.disk / 'cache'}"]
    if port is not None:
        runs.append(f"tracking.uri=http://127.0.0.1:{port}")
    studies = places.disk / "studies"
    if plan.command == "experiment":
        where = ["--workers", "2", "--studies", str(studies), "--results", str(places.disk / "results")]
        return [sys.executable, "-m", "muonlab.experiment", EXPERIMENT, *where, *runs]
    search = [f"study={NAME}", f"paths.studies={studies}", f"search.trials={plan.trials}", TOO_LARGE]
    search += [f"search.replicate_seeds={list(range(1, plan.seeds + 1))}", "search.workers=2"]
    if not plan.clip:
        search.append("~search.optimizers.muonclip")
    if plan.storage == "sqlite":
        search.append(f"search.storage=sqlite:///{places.queue}")
    return [sys.executable, "-m", "muonlab.sweep", "trainer=sweep", *search, *runs]


def environment(mark: str, places: Places) -> dict[str, str]:
    """Of every process of a round: marked, with fast heartbeats, and with a clock that can be moved."""
    path = os.pathsep.join([str(Path(__file__).parent / "clock"), str(ROOT)])
    return os.environ | {
        MARK: mark,
        "MUONLAB_BEAT": "1",
        "MUONLAB_CHAOS_CLOCK": str(places.clock),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(places.temporary),
    }


def start(words: list[str], mark: str, places: Places, output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a command of the study in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(mark, places),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def train_twin(plan: Plan, folder: Path, mark: str) -> Places:
    """The same study without a fault, a server or a worker, in `folder`. Raises RuntimeError where it fails."""
    places = Places(folder / "disk", folder)
    places.make()
    words = command_line(replace(plan, server=False, storage="journal"), places, None)
    with (folder / "parent.log").open("wb") as output:
        process = start(words, mark, places, output)
        code = process.wait()
    if code:
        text = (folder / "parent.log").read_text(errors="replace")
        raise RuntimeError(f"the undisturbed study ended with {code}:\n{text}")
    return places


class Server:
    """An MLflow server on loopback, which is killed and started again."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens. Raises RuntimeError where it does not within two minutes."""
        self.launch()
        last = time.monotonic() + 120
        while time.monotonic() < last:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the MLflow server does not start; see {self.folder / 'server.log'}")

    def launch(self) -> None:
        """Start it unless it runs, and do not wait."""
        if self._process is not None and self._process.poll() is None:
            return
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                words,
                env=os.environ | settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """kill -9 of the server and its workers."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
