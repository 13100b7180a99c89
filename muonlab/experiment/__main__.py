"""python -m muonlab.experiment NAME [scale=gpu] [overrides]: run or resume experiments/NAME.yaml, judge, draw."""

import os

# Read when torch loads OpenMP, so it must stand before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
from pathlib import Path

from muonlab.cli import run_command
from muonlab.experiment.spec import load_experiment


def main() -> int:
    """Exit code: 0 done, 2 a mistake in the command or failed runs, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m muonlab.experiment", description=__doc__.partition(": ")[2]
    )
    parser.add_argument("name", help="a file of experiments/, without .yaml")
    parser.add_argument(
        "overrides", nargs="*", help="scale=NAME, and Hydra overrides of every run, e.g. trainer.device=cuda"
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="runs at once (default: GPUs, or else cores)"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where NAME/ is written")
    arguments = parser.parse_args()
    scale = next((o.partition("=")[2] for o in arguments.overrides if o.startswith("scale=")), "cpu")
    overrides = [o for o in arguments.overrides if not o.startswith("scale=")]
    name = arguments.name if scale == "cpu" else f"{arguments.name}-{scale}"
    spec = load_experiment(arguments.name, scale)
    print(f"{name}: about {spec['minutes']} minutes, {' '.join(spec['question'].split())}", flush=True)

    from muonlab.experiment.judging import judge_and_draw
    from muonlab.experiment.training import train_experiment

    command = " ".join(["python -m muonlab.experiment", arguments.name, *arguments.overrides])
    trained, tuned = train_experiment(
        name, spec, overrides, arguments.workers, Path("studies") / name / "logs"
    )
    judge_and_draw(name, spec, trained, tuned, arguments.results / name, command)
    return 0


if __name__ == "__main__":
    run_command(main)
