"""Checks settings in a process of its own, which nobody else has made import torch: `Light` starts it and asks.

Run as a program it reads pickled requests (command, arguments) and answers each with the fields of an `Answer`.
"""

import io
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass
class Answer:
    """How a command that stops before its work ended: exit code, what it wrote, what its checked settings hold, for how
    many seconds of the processor it checked, and whether torch was imported."""

    code: Any
    out: str
    err: str
    held: Any
    seconds: float
    torch: bool


class Light:
    """The process. `ask` runs the checks of `python -m muonlab.<command>` with some arguments, and stops there."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder
        )

    def ask(self, command: str, *arguments: str) -> Answer:
        pickle.dump((command, arguments), self.process.stdin)
        self.process.stdin.flush()
        return Answer(*pickle.load(self.process.stdout))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


def answer(command: str, arguments: tuple[str, ...]) -> tuple[Any, ...]:
    """Run a command up to where its work would begin."""
    held: list[Any] = []
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [f"muonlab.{command}", *arguments]
    started = time.process_time()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run_command(lambda: COMMANDS[command](held))
        except SystemExit as end:
            code = end.code
        except Exception:
            code = traceback.format_exc()
    seconds = time.process_time() - started
    return code, out.getvalue(), err.getvalue(), held, seconds, "torch" in sys.modules


def train(held: list[Any]) -> int:
    """`held` gets the settings of every run."""

    def job(values: Any, _: Any) -> int:
        held.append(read_config(values).as_dict())
        return 0

    return hydra_command("train", job)


def sweep(held: list[Any]) -> int:
    """`held` gets the settings of the search, and those that its runs share."""

    def stop(study: Any) -> int:
        search = asdict(searches(study.design, "search"))
        held.append(study.base().as_dict() | {"search": search, "study": study.name})
        return 0

    command.sweep = stop
    return command.main()


def whole(module: str) -> Callable[[list[Any]], Any]:
    """A command that has no work to stop before."""

    def run(held: list[Any]) -> Any:
        return import_module(module).main()

    return run


if __name__ == "__main__":
    import muonlab.sweep as command
    from muonlab.cli import hydra_command
    from muonlab.command import run_command
    from muonlab.study.design import searches
    from muonlab.train.config import read_config

    COMMANDS = {"train": train, "sweep": sweep} | {
        name: whole(f"muonlab.{name}") for name in ("worker", "experiment")
    }
    COMMANDS |= {name: whole(f"muonlab.{name}.__main__") for name in ("data", "models", "record")}
    # What a command prints is caught, and anything else must not get between the answers.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        pickle.dump(answer(*request), answers)
        answers.flush()
