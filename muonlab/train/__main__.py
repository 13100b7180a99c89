"""python -m muonlab.train: one run (or, with -m, several) from the command line."""

import os
import sys

# Read when torch loads OpenMP, so it must stand before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from omegaconf import DictConfig

from muonlab.cli import check_overrides, plain, project_folder, run_command
from muonlab.errors import MuonlabError

EXIT_CODES = {"finished": 0, "diverged": 3, "out-of-memory": 4, "interrupted": 130}


def main() -> int:
    """Exit code: 0 finished, 2 a mistake in the command, 3 diverged, 4 out of memory, 130 interrupted."""
    check_overrides("train", sys.argv[1:])
    codes: list[int] = []

    @hydra.main(config_path=str(project_folder("conf")), config_name="train", version_base="1.3")
    def job(config: DictConfig) -> None:
        try:
            codes.append(one_run(plain(config)))
        except MuonlabError as error:  # one wrong job of a multirun does not end the others
            print(f"muonlab: {error}", file=sys.stderr)
            codes.append(2)

    job()
    return max(codes, default=0)


def one_run(config: dict) -> int:
    """Train, say in one line how it ended and, last, where the record is."""
    from muonlab.train.run import train

    outcome = train(config)
    ending = f"{outcome.status}: {outcome.cause}" if outcome.cause else outcome.status
    if not outcome.trained:
        ending += " (earlier; force=true trains it again)"
    elif outcome.status == "interrupted":
        ending += "; the same command goes on"
    print(ending, file=sys.stderr if EXIT_CODES[outcome.status] else sys.stdout)
    print(f"run: {outcome.folder}", flush=True)
    return EXIT_CODES[outcome.status]


if __name__ == "__main__":
    run_command(main)
