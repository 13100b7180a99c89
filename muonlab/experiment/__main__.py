"""python -m muonlab.experiment NAME [scale=gpu] [overrides]: run or resume experiments/NAME.yaml, judge, draw."""

import os

# Read when torch loads OpenMP, so it must stand before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from pathlib import Path

from muonlab.cli import run_command
from muonlab.errors import MuonlabError
from muonlab.experiment.catalogue import experiment_names
from muonlab.experiment.spec import load_experiment


def main() -> int:
    """Exit code: 0 done, 2 a mistake in the command or failed runs, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m muonlab.experiment", description=__doc__.partition(": ")[2]
    )
    parser.add_argument("name", help="a file of experiments/, without .yaml; `all` for every one")
    parser.add_argument(
        "overrides", nargs="*", help="scale=NAME, and Hydra overrides of every run, e.g. trainer.device=cuda"
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="runs at once (default: GPUs, or else cores)"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where NAME/ is written")
    arguments = parser.parse_args()
    names = experiment_names() if arguments.name == "all" else [arguments.name]
    failed = []
    for name in names:
        try:
            run_experiment(name, arguments.overrides, arguments.workers, arguments.results)
        except MuonlabError as error:
            if len(names) == 1:
                raise
            print(f"muonlab: {name}: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise MuonlabError(f"{len(failed)} of {len(names)} experiments failed: {', '.join(failed)}")
    return 0


def run_experiment(experiment: str, given: list[str], workers: int | None, results: Path) -> None:
    """Train what is missing of one experiment, judge and draw it into results/NAME, and renew results/README.md."""
    scale = next((o.partition("=")[2] for o in given if o.startswith("scale=")), "cpu")
    overrides = [o for o in given if not o.startswith("scale=")]
    name = experiment if scale == "cpu" else f"{experiment}-{scale}"
    spec = load_experiment(experiment, scale)
    print(f"{name}: about {spec['minutes']} minutes. {' '.join(spec['question'].split())}", flush=True)

    from analysis.evidence import write_evidence
    from analysis.redraw import redraw
    from muonlab.experiment.judging import judge_experiment
    from muonlab.experiment.training import train_experiment

    trained, tuned = train_experiment(name, spec, overrides, workers, Path("studies") / name / "logs")
    command = " ".join(["python -m muonlab.experiment", experiment, *given])
    judge_experiment(name, spec, trained, tuned, results / name, command)
    print(f"\nwritten: {results / name}, {write_evidence(results)}")
    for path in redraw(results / name):
        print(f"  {path}")


if __name__ == "__main__":
    run_command(main)
