"""One round: a study is started, disturbed at moments that the seed draws, and started again until it is done."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO

from chaos import disk
from chaos.faults import KINDS, Kind
from chaos.processes import end, living
from chaos.scene import Scene
from chaos.study import LAST_CHECKPOINT, Places, Plan, Server, command_line, start
from chaos.verdict import Violation, judge, tracebacks

MOST_STARTS = 80
# Starts in a row that fail although nothing disturbs them, until the study counts as failed for good.
MOST_FAILURES = 3
LONGEST_CALM = 300.0  # seconds that an undisturbed command may take


@dataclass(frozen=True)
class Fault:
    """second: of the round. what: what it was done to."""

    second: float
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.second:7.2f} s  {self.kind}: {self.what}"


@dataclass
class Round:
    """mark: its name. faults: how many at most. every: seconds between them, on the average. longest_lock: of a
    database, in seconds. without: kinds of fault that are left out."""

    mark: str
    plan: Plan
    folder: Path
    random: Random
    faults: int
    every: float
    longest_lock: float
    without: tuple[str, ...] = ()
    injected: list[Fault] = field(default_factory=list)
    starts: int = 0

    def __post_init__(self) -> None:
        self.places = Places(self.folder / "disk", self.folder / "output")
        self.kinds = [
            kind
            for kind in KINDS.values()
            if kind.name not in self.without and (disk.can_mount() or not kind.mounts)
        ]
        self._began = self._command_began = time.monotonic()
        self._helpers, self._injections = self._help(), self._injector()

    def run(self, twin: Places, progress: Callable[[], None]) -> list[Violation]:
        """Carry the study out and compare it with its twin."""
        self.progress = progress
        if disk.can_mount():
            disk.mount(self.places.disk)
        self.places.make()
        server = Server(self.places.output) if self.plan.server else None
        self.scene = Scene(self.mark, self.places, self.random, server, self.longest_lock)
        try:
            if server is not None:
                server.start()
            self._began = time.monotonic()
            if failure := self._until_done():
                return [failure, *tracebacks(self.places)]
            violations = self._left_alive()
            if server is not None:
                server.kill()
            return violations + judge(self.places, twin, self.plan)
        finally:
            self.scene.settle(everything=True)
            end(self.mark)
            if server is not None:
                server.kill()

    def remove(self, keep: Path | None) -> None:
        """Take the round's disk away, with what is on it kept in `keep`."""
        if keep is not None:
            shutil.copytree(self.folder, keep, dirs_exist_ok=True, symlinks=True, ignore=_sockets)
        if disk.can_mount():
            disk.unmount(self.places.disk)
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------------ starts
    def _until_done(self) -> Violation | None:
        """Start the command until it is done, the last time with nothing that disturbs it; why it never is."""
        failures = 0
        while self.starts < MOST_STARTS:
            if calm := len(self.injected) >= self.faults:
                self.scene.settle(everything=True)
            if self.scene.server is not None and not self.scene.pending:
                self.scene.server.start()  # it ends by itself where its database is locked while it starts
            before, lasting = len(self.injected), bool(self.scene.pending)
            code = self._once(calm)
            disturbed = lasting or len(self.injected) > before
            self.progress()
            if code == 0 and calm:
                return None
            if code == 0:
                self.faults = len(self.injected)  # done before all faults were: once more, undisturbed
            failures = 0 if code == 0 or disturbed else failures + 1
            if code is None or failures == MOST_FAILURES:
                how = f"ends with {code}" if code is not None else f"runs for {LONGEST_CALM:g} s"
                return Violation("failed for good", f"undisturbed, it {how}: {self._last_line()}")
        return Violation("failed for good", f"not done after {MOST_STARTS} starts: {self._last_line()}")

    def _once(self, calm: bool) -> int | None:
        """Start the command and wait for its end; None where it takes too long."""
        self.starts += 1
        port = self.scene.server.port if self.scene.server else None
        words = command_line(self.plan, self.places, port)
        self._command_began = time.monotonic()
        with self._output("parent") as output:
            process = start(words, self.mark, self.places, output)
        while process.poll() is None:
            self.scene.settle()
            if not calm:
                next(self._helpers)
            if len(self.injected) < self.faults:
                next(self._injections)
            elif calm and time.monotonic() - self._command_began > LONGEST_CALM:
                end(self.mark)
                return None
            time.sleep(0.02)
        if not calm and self.random.random() < 0.5:
            time.sleep(self.random.uniform(0.0, 2.0))
        return process.returncode

    def _help(self) -> Iterator[None]:
        """Starts a worker at a random moment, if none lives, and again after it was killed."""
        due = time.monotonic() + self.random.uniform(2.0, 20.0)
        helpers: list[subprocess.Popen[bytes]] = []
        while True:
            for helper in helpers:
                helper.poll()
            if self.plan.worker and time.monotonic() > due and (self.places.study / "study.yaml").exists():
                if not living(self.mark, "worker"):
                    command = [
                        sys.executable,
                        "-m",
                        "muonlab.worker",
                        str(self.places.study),
                        "--workers",
                        "1",
                    ]
                    with self._output("worker") as output:
                        helpers.append(start(command, self.mark, self.places, output))
                due = time.monotonic() + self.random.uniform(5.0, 20.0)
            yield

    # ------------------------------------------------------------------ faults
    def _injector(self) -> Iterator[None]:
        """Injects a fault whenever its moment has come; some wait for a moment of the study."""
        while True:
            [kind] = self.random.choices(self.kinds, [kind.weight for kind in self.kinds])
            aim = self._aim(kind)
            due = time.monotonic() + self.random.expovariate(1 / self.every)
            latest = time.monotonic() + 8 * self.every
            yield
            while not (aim() if aim else time.monotonic() > due) and time.monotonic() < latest:
                yield
            self._inject(kind)

    def _aim(self, kind: Kind) -> Callable[[], bool] | None:
        if not kind.aimed or self.random.random() > 0.3:
            return None
        return self.random.choice([self._next_start(), self._last_step(), self._last_run])

    def _inject(self, kind: Kind) -> None:
        second = time.monotonic() - self._began
        what = kind.inject(self.scene)
        if what is not None:
            self.injected.append(Fault(second, kind.name, what))
            self.progress()

    def _next_start(self) -> Callable[[], bool]:
        """The next start of the command is in its imports, makes its stores, or starts its first runs."""
        starts, delay = self.starts, self.random.uniform(0.0, 10.0)
        return lambda: self.starts > starts and time.monotonic() - self._command_began > delay

    def _last_step(self) -> Callable[[], bool]:
        """A run has just saved its last checkpoint that had not when this was asked."""
        pattern = f"[!.]*/checkpoints/{LAST_CHECKPOINT}"
        before = set(self.places.runs.glob(pattern))
        return lambda: bool(set(self.places.runs.glob(pattern)) - before)

    def _last_run(self) -> bool:
        """Every run of the study is over."""
        over = 0
        for path in self.places.runs.glob("[!.]*/status.json"):
            try:
                over += json.loads(path.read_text())["status"] in ("finished", "diverged")
            except (OSError, ValueError, KeyError):
                continue
        return over >= self.plan.runs

    # ------------------------------------------------------------------ the end
    def _left_alive(self) -> list[Violation]:
        """A worker may take a moment to see that nothing is left; then nothing may live on."""
        last = time.monotonic() + 45
        while (left := living(self.mark)) and time.monotonic() < last:
            time.sleep(0.1)
        return [Violation("left behind", f"{process} lives on") for process in left]

    def _output(self, role: str) -> IO[bytes]:
        return (self.places.output / f"{role}-{self.starts:03d}.log").open("ab")

    def _last_line(self) -> str:
        text = (self.places.output / f"parent-{self.starts:03d}.log").read_text(errors="replace").strip()
        return text.splitlines()[-1][-300:] if text else "without a word"


def _sockets(folder: str, names: list[str]) -> list[str]:
    """Those of a killed fork server, which cannot be copied."""
    return [name for name in names if (Path(folder) / name).is_socket()]
