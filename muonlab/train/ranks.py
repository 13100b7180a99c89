"""The processes of a run on several devices: started, watched and ended together.

    python -m muonlab.train.ranks CONFIG REPORT

is one of them: it trains the run of the config file at the place that its environment gives, and reports to the file
descriptor REPORT, one line of JSON per step and one at the end. `train_on_ranks` starts it; users do not.
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypedDict

# Read when torch loads OpenMP, so it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from muonlab.command import STOPPING, Interruption, listen
from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.train.config import RunConfig, read_config
from muonlab.train.run import Outcome

# Seconds that the other ranks have to end by themselves after one has ended, then after SIGTERM, before SIGKILL.
PATIENCE, LAST = 8.0, 8.0
_PR_SET_PDEATHSIG = 1
PASSING = {"step", "reading"}


class EndValues(TypedDict):
    """The fields of an Outcome as JSON."""

    folder: str
    status: str
    cause: str
    trained: bool
    signal: int


class Report(TypedDict, total=False):
    """A line that a rank writes: the steps it has done or its loss and max logit (PASSING), or, last, one of the
    others."""

    step: int
    reading: tuple[float, float]
    outcome: EndValues
    mistake: str
    fault: str
    crash: str


class RankLost(EnvironmentFault):
    """A process of the run was killed from outside, and the others were stopped with it."""


@dataclass
class Rank:
    """One process of a run, and its reports so far but those in PASSING."""

    number: int
    process: subprocess.Popen
    pipe: int
    unread: bytes = b""
    reports: list[Report] = field(default_factory=list)

    @property
    def end(self) -> Report | None:
        """Its last report: "outcome", "mistake", "fault" or "crash"; None if it ended without one."""
        return self.reports[0] if self.reports else None

    def read(self) -> list[Report]:
        """Its reports since the last call; none once the pipe is closed."""
        try:
            text = os.read(self.pipe, 1 << 16)
        except BlockingIOError:
            return []
        *lines, self.unread = (self.unread + text).split(b"\n")
        new: list[Report] = [json.loads(line) for line in lines]
        self.reports += [report for report in new if not PASSING & report.keys()]
        return new


class Ranks:
    """The processes of one run on this machine, from their start to their end."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        on_step: Callable[[int], None] | None,
        on_reading: Callable[[float, float], None] | None,
    ):
        self.config, self.folder = config, folder
        self.on_step, self.on_reading = on_step, on_reading
        self.asked = 0
        self.ranks: list[Rank] = []
        self._old: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def run(self) -> Outcome:
        """Start them, wait for all and return how the run ended. Raises what `train` raises."""
        with tempfile.TemporaryDirectory(prefix="muonlab-") as place:
            config = Path(place) / "config.json"
            config.write_text(json.dumps(self.config.as_dict()), encoding="utf-8")
            if threading.current_thread() is threading.main_thread():
                heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
                self._old = {number: signal.signal(number, self._pass_on) for number in heard}
            try:
                port = _free_port()
                self.ranks = [
                    self._start(number, port, config) for number in range(self.config.trainer.devices)
                ]
                if self.asked:  # while they were started
                    self._send(self.asked)
                self._wait()
            finally:
                self._send(signal.SIGKILL)
                for number, handler in self._old.items():
                    signal.signal(number, handler)
                for rank in self.ranks:
                    rank.process.wait()
                    os.close(rank.pipe)
        return self._outcome()

    def _start(self, number: int, port: int, config: Path) -> Rank:
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        devices = self.config.trainer.devices
        place = {"LOCAL_RANK": number, "NODE_RANK": 0, "WORLD_SIZE": devices, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        environment["MASTER_ADDR"] = "127.0.0.1"
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "muonlab.train.ranks", str(config), str(theirs)],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs],
                start_new_session=True,  # a terminal's Ctrl-C comes from here, once
            )
        finally:
            os.close(theirs)
        return Rank(number, process, ours)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        self._send(number)

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                with suppress(ProcessLookupError):
                    rank.process.send_signal(number)

    def _wait(self) -> None:
        """Read reports until all have ended; once one has, the others must follow soon or are killed."""
        first_end = None
        escalation = [(PATIENCE, signal.SIGTERM), (PATIENCE + LAST, signal.SIGKILL)]
        with selectors.DefaultSelector() as selector:
            for rank in self.ranks:
                selector.register(rank.pipe, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select(timeout=0.25):
                    reports = key.data.read()
                    for report in reports:
                        if "step" in report and self.on_step:
                            self.on_step(report["step"])
                        if "reading" in report and self.on_reading:
                            self.on_reading(*report["reading"])
                    if not reports and not key.data.unread:
                        selector.unregister(key.fd)
                ended = [rank for rank in self.ranks if rank.process.poll() is not None]
                if ended and first_end is None:
                    first_end = time.monotonic()
                if first_end is not None and escalation and time.monotonic() - first_end > escalation[0][0]:
                    self._send(escalation.pop(0)[1])
        for rank in self.ranks:
            rank.process.wait()

    def _outcome(self) -> Outcome:
        ends = [(rank, rank.end) for rank in self.ranks]
        killed = [rank for rank, end in ends if end is None]
        last = [end for _, end in ends if end is not None]
        for end in last:
            if "crash" in end:
                raise RuntimeError(end["crash"])
        for end in last:
            if "mistake" in end:
                raise MuonlabError(end["mistake"])
        first = self.ranks[0].end
        if killed and not self.asked:
            lost = killed[0]
            raise RankLost(
                f"rank {lost.number} of {len(self.ranks)} {_ending(lost.process.returncode)}, and the others were"
                " stopped with it; rerun the same command to resume from the last checkpoint"
            )
        if first is not None and "outcome" in first:
            values = first["outcome"]
            folder = Path(values["folder"])
            return Outcome(
                folder, values["status"], values["cause"], values["trained"], signal=values["signal"]
            )
        for end in last:
            if "fault" in end and not self.asked:
                raise EnvironmentFault(end["fault"])
        name = signal.Signals(self.asked).name
        return Outcome(self.folder, "interrupted", name, signal=self.asked)


def train_on_ranks(
    config: RunConfig,
    folder: Path,
    on_step: Callable[[int], None] | None,
    on_reading: Callable[[float, float], None] | None,
) -> Outcome:
    """Call `train` in as many processes on this machine as the run has devices.

    Each runs this module, so that nothing depends on the command that was typed. A signal to this process goes to all
    of them. They end together: if one is killed the others stop within PATIENCE + LAST seconds, without messages of
    their own. Raises RankLost for that, and what `train` raises in one of them.
    """
    return Ranks(config, folder, on_step, on_reading).run()


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM once the process that started this one is gone; elsewhere it runs to its end."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(config_file: str, report_to: int) -> None:
    """Body of one rank. The parent prints everything except the first rank's progress and the traceback of a crash."""

    def report(**what: object) -> None:
        with suppress(OSError):  # the parent is gone
            os.write(report_to, json.dumps(what).encode() + b"\n")

    _end_with_parent()
    try:
        listen()
        config = read_config(json.loads(Path(config_file).read_text(encoding="utf-8")))
        from muonlab.train.run import train

        first = int(os.environ["LOCAL_RANK"]) == 0
        outcome = train(
            config,
            (lambda step: report(step=step)) if first else None,
            (lambda *reading: report(reading=reading)) if first else None,
        )
        report(outcome={**asdict(outcome), "folder": str(outcome.folder)})
    except EnvironmentFault as error:
        report(fault=str(error))
    except MuonlabError as error:
        report(mistake=str(error))
    except Interruption as stop:  # before the first step
        report(fault=f"stopped by {signal.Signals(stop.number).name}")
    except BaseException as error:
        traceback.print_exc()
        report(crash=f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of a process group whose other ranks are gone may wait for them forever.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
