"""python -m muonlab.sweep: search, repeat the best over fresh seeds, compare. The same command goes on or redraws."""

import os
import sys

# Read when torch loads OpenMP, so it must stand before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from typing import Any

from muonlab.cli import hydra_command, run_command
from muonlab.sweep.plan import Plan, make_plan


def main() -> int:
    """Exit code: 0 done, 2 a mistake in the command, 3 an optimizer without a finished trial, 130 interrupted."""
    return hydra_command("sweep", lambda config: sweep(make_plan(config)))


def sweep(plan: Plan) -> int:
    """Carry out what is left of a plan and report."""
    from muonlab.sweep.pool import Pool, default_slots
    from muonlab.sweep.report import report
    from muonlab.sweep.search import open_studies, remaining, replicate, search

    studies = open_studies(plan)
    left, trials = remaining(studies, plan.search["trials"]), plan.search["trials"]
    print(
        f"study {plan.name}: {trials * len(studies) - left} of {trials * len(studies)} trials done",
        flush=True,
    )
    print(plan.fairness(), flush=True)
    pool = Pool(plan.search["workers"] or default_slots(), plan.folder / "logs")
    parent = open_parent(plan)
    if left:
        search(plan, studies, pool, parent and parent.run_id)
    replicates = replicate(plan, studies, pool, parent and parent.run_id)
    files = report(plan, studies, replicates)
    if parent is not None:
        parent.log_folder(plan.folder)
        parent.finish("finished")
    for path in files:
        print(f"  {path}")
    if plan.config["tracking"]["name"] == "mlflow":
        print(f"look at every run: make ui  (or {ui_command(plan.config)})")
    return 0 if all(replicates.values()) else 3


def open_parent(plan: Plan) -> Any:
    """The MLflow run under which all runs of the study are shown; None without MLflow."""
    from muonlab.train.tracking import open_study_run

    return open_study_run(
        plan.config, plan.name, plan.folder, {"search": plan.search, "fairness": plan.fairness()}
    )


def ui_command(config: dict[str, Any]) -> str:
    """The command that shows the store of `config` in a browser."""
    from muonlab.record.store import store_uri

    uri = store_uri(config["tracking"]["uri"], config["paths"]["runs"])
    return f"{os.path.relpath(sys.executable)} -m mlflow ui --backend-store-uri {uri}"


if __name__ == "__main__":
    run_command(main)
