"""python -m muonlab.worker FOLDER [FOLDER ...] [--workers N]: help with studies that other commands began.

Start it on as many machines as share the study's storage and the folders with the study and its runs. It takes open
slots until none is left; the command that began the study judges and reports. A folder of studies stands for each study
in it, one after the other, and those that are begun meanwhile: `muonlab.worker studies` helps with `make evidence`.
"""

import muonlab.begin  # noqa: F401

# isort: split
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from muonlab.command import argument_parser, run_command
from muonlab.settings.check import Count, check
from muonlab.study.study import FILE, load_study


def main() -> int:
    """Exit code: 0 no open slot is left, 2 a mistake in the command, 3 slots are missing, 130 interrupted."""
    parser = argument_parser("muonlab.worker", __doc__.splitlines()[0].partition(": ")[2])
    parser.add_argument(
        "folders", type=Path, nargs="+", help="a study's folder, such as studies/ablation, or one of several"
    )
    parser.add_argument("--workers", type=int, help="runs at once (default: as many as GPUs, or else cores)")
    given = parser.parse_args()
    workers = check(Count | None, given.workers, "--workers")
    missing: dict[Path, int] = {}
    while new := [folder for folder in study_folders(given.folders) if folder not in missing]:
        study = replace(load_study(new[0]), workers=workers)

        from muonlab.study.run import help_with

        missing[new[0]] = count = help_with(study)
        print(f"no open slot is left in {study.name}" + (f"; {count} have no finished run" if count else ""))
    return 3 if any(missing.values()) else 0


def study_folders(folders: Iterable[Path]) -> list[Path]:
    """The studies in these folders: each itself, or those directly in it; itself too where there is none."""
    studies = []
    for folder in folders:
        inside = [] if (folder / FILE).exists() else sorted(path.parent for path in folder.glob(f"*/{FILE}"))
        studies += inside or [folder]
    return studies


if __name__ == "__main__":
    run_command(main)
