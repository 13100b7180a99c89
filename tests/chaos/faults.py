"""The kinds of fault: each is one function that does it once, or finds nothing to do it to.

A kind takes the scene and returns what it did. What has to be put right again later is left with `scene.after`.
"""

import json
import os
import resource
import signal
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from chaos import disk
from chaos.processes import Process, crash, living
from chaos.scene import Scene

HOUR = 3600.0


Inject = Callable[[Scene], str | None]


@dataclass(frozen=True)
class Kind:
    """weight: how often it is taken. aimed: whether it may wait for the last step of a run or the study's end. mounts:
    whether it needs a disk of the round's own. inject: does it; None where there is nothing to do it to."""

    name: str
    weight: float
    aimed: bool
    mounts: bool
    inject: Inject


KINDS: dict[str, Kind] = {}


def kind(name: str, weight: float, aimed: bool = False, mounts: bool = False) -> Callable[[Inject], Inject]:
    """Registers a kind of fault."""

    def register(inject: Inject) -> Inject:
        KINDS[name] = Kind(name, weight, aimed, mounts, inject)
        return inject

    return register


# ---------------------------------------------------------------------- signals
def _send(number: signal.Signals, roles: Sequence[str], scene: Scene) -> str | None:
    process = scene.one(*roles)
    if process is None or (number != signal.SIGKILL and not process.hears):
        return None
    process.send(number)
    return str(process)


for _role, _weight in (("run", 4.0), ("worker", 2.0), ("fork server", 1.5), ("parent", 2.0)):
    kind(f"kill -9 of a {_role}", _weight, aimed=True)(partial(_send, signal.SIGKILL, [_role]))
for _number, _weight in ((signal.SIGTERM, 2.0), (signal.SIGINT, 1.0), (signal.SIGHUP, 1.0)):
    kind(_number.name, _weight, aimed=True)(partial(_send, _number, ["run", "worker", "parent"]))


@kind("kill -9 of everything", 0.7, aimed=True)
def kill_everything(scene: Scene) -> str | None:
    """The machine stops, with every file as it is."""
    with crash(processes := living(scene.mark)):
        pass
    return ", ".join(map(str, processes)) or None


@kind("SIGINT twice", 1.0, aimed=True)
def interrupt_twice(scene: Scene) -> str | None:
    """An impatient Ctrl-C."""
    process = scene.one("run", "worker", "parent")
    if process is None or not process.hears:
        return None
    process.send(signal.SIGINT)
    pause = scene.random.uniform(0.02, 1.0)
    scene.after(pause, partial(process.send, signal.SIGINT))
    return f"{process}, again after {pause:.2f} s"


@kind("Ctrl-C in a terminal", 0.7, aimed=True)
def interrupt_terminal(scene: Scene) -> str | None:
    """SIGINT to a command and whatever it started."""
    process = scene.one("worker", "parent")
    if process is None or not process.hears:
        return None
    with suppress(ProcessLookupError):
        os.killpg(os.getpgid(process.pid), signal.SIGINT)
    return f"the group of {process}"


@kind("SIGSTOP, then SIGCONT", 2.5)
def stop_for_a_while(scene: Scene) -> str | None:
    """A process that gives no sign of life for up to six of its heartbeats."""
    process = scene.one("run", "worker", "parent", "fork server")
    if process is None:
        return None
    process.send(signal.SIGSTOP)
    pause = scene.random.uniform(0.3, 6.0)
    scene.after(pause, partial(process.send, signal.SIGCONT))
    return f"{process} for {pause:.1f} s"


# ---------------------------------------------------------------------- memory, disk, clock
@kind("memory limit of a run", 2.5)
def exhaust_memory(scene: Scene) -> str | None:
    """The system gives a run's process no more memory, or next to none."""
    process = scene.one("run")
    if process is None:
        return None
    more = scene.random.randrange(8 << 20)
    try:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    except (OSError, ValueError, IndexError):  # it ended
        return None
    return f"{process}, {more / 1e6:.1f} MB more"


@kind("disk full", 2.0, mounts=True)
def fill_disk(scene: Scene) -> str | None:
    """For a second, the disk takes nothing more."""
    if (scene.places.disk / ".filler").exists():
        return None
    filler, pause = disk.fill(scene.places.disk), scene.random.uniform(0.5, 2.0)
    scene.after(pause, partial(filler.unlink, missing_ok=True))
    return f"for {pause:.1f} s"


@kind("folder read-only", 2.0, mounts=True)
def make_read_only(scene: Scene) -> str | None:
    """For a second, nothing can be opened for writing in a folder: all runs, one run, or the study's."""
    places = scene.places
    folders = [f for f in (places.runs, places.study, *places.runs.glob("[!.]*-s[0-9]*")) if f.is_dir()]
    if not folders or any(os.path.ismount(folder) for folder in folders):
        return None
    folder, pause = scene.random.choice(folders), scene.random.uniform(0.5, 1.5)
    if not disk.make_read_only(folder):
        return None
    scene.after(pause, partial(disk.unmount, folder))
    return f"{folder.relative_to(places.disk)} for {pause:.1f} s"


@kind("clock moved", 1.5)
def move_clock(scene: Scene) -> str | None:
    """The wall clock jumps by up to six hours, back or on, and stays there."""
    seconds = scene.random.uniform(-6 * HOUR, 6 * HOUR)
    new = scene.places.clock.with_name("clock.new")
    new.write_text(f"{seconds:.3f}")
    new.replace(scene.places.clock)
    return f"{seconds / HOUR:+.1f} h"


# ---------------------------------------------------------------------- torn files
def _tear(path: Path | None, processes: Sequence[Process], random: Random) -> str | None:
    """Cut a file anywhere. The processes die with it: a file is torn by a crash, not under a living process."""
    if path is None:
        return None
    with crash(processes), suppress(OSError):
        size = path.stat().st_size
        left = random.randrange(max(size, 1))
        os.truncate(path, left)
        return f"{'/'.join(path.parts[-3:])} to {left} of {size} bytes"
    return f"{path.name} was gone; {len(processes)} processes were killed"


def _newest(scene: Scene, pattern: str) -> Path | None:
    """The file that was written last in a run that is not over."""
    paths = [path for path in scene.places.runs.glob(pattern) if not _is_over(scene.places.runs, path)]
    return max(paths, key=_age, default=None)


def _age(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # it was removed just now
        return 0


def _is_over(runs: Path, path: Path) -> bool:
    folder = runs / path.relative_to(runs).parts[0]
    try:
        return json.loads((folder / "status.json").read_text())["status"] in ("finished", "diverged")
    except (OSError, ValueError, KeyError, TypeError):
        return False


@kind("checkpoint torn", 1.5)
def tear_checkpoint(scene: Scene) -> str | None:
    """The newest one of a run that is not over, with all run processes."""
    return _tear(_newest(scene, "[!.]*/checkpoints/step-*.ckpt"), living(scene.mark, "run"), scene.random)


@kind("Parquet part torn", 1.5)
def tear_trace(scene: Scene) -> str | None:
    """The newest part, likewise."""
    return _tear(_newest(scene, "[!.]*/traces/*.parquet"), living(scene.mark, "run"), scene.random)


@kind("JSON file torn", 2.0)
def tear_json(scene: Scene) -> str | None:
    """Any small file of a run, over or not, or of the study, with every process."""
    places = scene.places
    paths = [*places.runs.glob("[!.]*/*.json"), *places.runs.glob("[!.]*/config.yaml")]
    paths += [*places.study.glob("*.json"), *places.study.glob("study.yaml")]
    paths += [*places.study.glob("mlflow_run_id"), *places.runs.glob("[!.]*/status.json")]
    path = scene.random.choice(sorted(paths)) if paths else None
    return _tear(path, living(scene.mark), scene.random)


@kind("journal's end torn", 1.0)
def tear_journal(scene: Scene) -> str | None:
    """The last line lacks its end, or half a line follows it, which nobody read: every process dies with it."""
    journal = scene.places.study / "journal.log"
    if not journal.exists() or not journal.stat().st_size:
        return None
    with crash(living(scene.mark)):
        last = journal.read_bytes().splitlines(keepends=True)[-1]
        if scene.random.random() < 0.5:
            with suppress(OSError), journal.open("ab", buffering=0) as file:  # the disk may be full
                file.write(last[: scene.random.randrange(1, max(len(last), 2))])
            return "half a line more"
        cut = scene.random.randrange(1, min(len(last), 40) + 1)
        os.truncate(journal, journal.stat().st_size - cut)
        return f"{cut} bytes less"


# ---------------------------------------------------------------------- stores
def _lock(path: Path, scene: Scene) -> str | None:
    """Nobody else can write the database for a while."""
    if not path.exists():
        return None
    try:
        connection = sqlite3.connect(path, timeout=0.5, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error:  # somebody writes, or there is no room
        return None
    # Most are short: a lock of a minute is one that every writer gives up on, and costs a minute.
    pause = scene.longest_lock * scene.random.random() ** 4
    scene.after(pause, connection.close)
    return f"{path.name} for {pause:.1f} s"


@kind("MLflow's database locked", 2.0)
def lock_tracking(scene: Scene) -> str | None:
    """Up to `longest_lock`."""
    return _lock(scene.places.tracking, scene)


@kind("Optuna's database locked", 3.0)
def lock_queue(scene: Scene) -> str | None:
    """Up to `longest_lock`, where the queue is no journal."""
    return _lock(scene.places.queue, scene)


@kind("MLflow server killed", 3.0)
def kill_server(scene: Scene) -> str | None:
    """It comes back after up to ten seconds."""
    if scene.server is None:
        return None
    scene.server.kill()
    pause = scene.random.uniform(0.0, 10.0)
    scene.after(pause, scene.server.launch)
    return f"for {pause:.1f} s"
