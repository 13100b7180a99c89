"""python -m muonlab.train: one run (or, with -m, several) from the command line."""

import muonlab.begin  # noqa: F401

# isort: split
import sys

from muonlab.cli import Config, hydra_command
from muonlab.command import run_command
from muonlab.train.config import read_config

EXIT_CODES = {"finished": 0, "diverged": 3, "out-of-memory": 4}


def main() -> int:
    """Exit code: 0 finished, 2 a mistake in the command or a failure of the machine, 3 diverged, 4 too large for this
    machine's memory, 128 + the number of the signal that interrupted it (130: Ctrl-C)."""
    return hydra_command("train", one_run)


def one_run(values: Config, overrides: list[str]) -> int:
    """Train, and print how the run ended and where its record is."""
    config = read_config(values)
    from muonlab.train.place import is_first
    from muonlab.train.run import train

    outcome = train(config)
    code = 128 + outcome.signal if outcome.status == "interrupted" else EXIT_CODES[outcome.status]
    if not is_first(config.trainer.devices):
        return code
    ending = f"{outcome.status}: {outcome.cause}" if outcome.cause else outcome.status
    if not outcome.trained:
        ending += " (earlier; force=true trains it again)"
    elif outcome.status == "interrupted":
        ending += "; rerun the same command to resume"
    print(ending, file=sys.stderr if code else sys.stdout)
    print(f"run: {outcome.folder}", flush=True)
    return code


if __name__ == "__main__":
    run_command(main)
