"""python -m muonlab.sweep.worker STUDY_FOLDER [workers=N]: help with a study that `python -m muonlab.sweep` began.

Start it on as many machines as share the study's storage and the folder with its runs. It takes waiting trials until
none is left; the command that began the study repeats the best settings and reports.
"""

import os
import sys

# Read when torch loads OpenMP, so it must stand before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
from pathlib import Path

from muonlab.cli import run_command
from muonlab.sweep.plan import load_plan


def main() -> int:
    """Exit code: 0 no trial is waiting any more, 2 a mistake in the command, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m muonlab.sweep.worker", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="the study's folder, as the sweep printed it")
    parser.add_argument(
        "--workers", type=int, default=None, help="runs at once (default: GPUs, or else cores)"
    )
    arguments = parser.parse_args(sys.argv[1:])
    plan = load_plan(arguments.folder)
    from muonlab.sweep.__main__ import open_parent
    from muonlab.sweep.pool import Pool, default_slots
    from muonlab.sweep.search import open_studies, search

    studies = open_studies(plan)
    parent = open_parent(plan)
    search(
        plan,
        studies,
        Pool(arguments.workers or default_slots(), plan.folder / "logs"),
        parent and parent.run_id,
    )
    print(f"no trial of {plan.name} is waiting any more")
    return 0


if __name__ == "__main__":
    run_command(main)
