"""python -m muonlab.worker FOLDER [FOLDER ...] [--workers N]: help with studies that other commands started.

Start it on any number of machines that share the study's storage and the folders of the study and its runs. It takes
open slots until none is left; the command that started the study judges and reports. A folder of studies means every
study in it, one after another, those started meanwhile included: `muonlab.worker studies` helps with `make evidence`.
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
    """Exit code: 0 no open slot is left, 2 a mistake in the command, 3 some slots have no finished run, 130
    interrupted."""
    parser = argument_parser("muonlab.worker", __doc__.splitlines()[0].partition(": ")[2])
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        help="a study's folder, such as studies/ablation, or a folder of studies",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="runs at a time on this machine (default: its GPUs, or else its cores)",
    )
    arguments = parser.parse_args()
    workers = None if arguments.workers is None else check(Count, arguments.workers, "--workers")
    missing: dict[Path, int] = {}
    while new := [folder for folder in study_folders(arguments.folders) if folder not in missing]:
        study = replace(load_study(new[0]), workers=workers)

        from muonlab.study.run import help_with

        missing[new[0]] = count = help_with(study)
        print(f"no open slot is left in {study.name}" + (f"; {count} have no finished run" if count else ""))
    return 3 if any(missing.values()) else 0


def study_folders(folders: Iterable[Path]) -> list[Path]:
    """The studies that these folders are or directly hold; a folder that is and holds none is returned as it is."""
    studies = []
    for folder in folders:
        inside = [] if (folder / FILE).exists() else sorted(path.parent for path in folder.glob(f"*/{FILE}"))
        studies += inside or [folder]
    return studies


if __name__ == "__main__":
    run_command(main)
