"""python -m muonlab.worker STUDY_FOLDER [--workers N]: help with a study that another command began.

Start it on as many machines as share the study's storage and the folders with the study and its runs. It takes open
slots until none is left; the command that began the study judges and reports.
"""

import os

# Read when torch loads OpenMP, so it must stand before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dataclasses import replace
from pathlib import Path

from muonlab.command import argument_parser, run_command
from muonlab.settings.check import Count, check
from muonlab.study.study import load_study


def main() -> int:
    """Exit code: 0 no open slot is left, 2 a mistake in the command, 3 slots are missing, 130 interrupted."""
    parser = argument_parser("muonlab.worker", __doc__.splitlines()[0].partition(": ")[2])
    parser.add_argument("folder", type=Path, help="the study's folder, such as studies/ablation")
    parser.add_argument("--workers", type=int, help="runs at once (default: as many as GPUs, or else cores)")
    given = parser.parse_args()
    workers = check(Count | None, given.workers, "--workers")
    study = replace(load_study(given.folder), workers=workers)

    from muonlab.study.run import help_with

    missing = help_with(study)
    print(f"no open slot is left in {study.name}" + (f"; {missing} have no finished run" if missing else ""))
    return 3 if missing else 0


if __name__ == "__main__":
    run_command(main)
