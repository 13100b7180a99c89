"""python -m muonlab.sweep: search, repeat the best over fresh seeds, compare. The same command goes on or redraws."""

import os
import sys

# Read when torch loads OpenMP, so it must stand before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path
from typing import Any

from muonlab.cli import hydra_command, run_command
from muonlab.sweep.plan import Plan, make_plan


def main() -> int:
    """Exit code: 0 done, 2 a mistake in the command, 3 an optimizer without a finished trial, 130 interrupted."""
    return hydra_command("sweep", lambda config: sweep(make_plan(config)))


def sweep(plan: Plan) -> int:
    """Carry out what is left of a plan, report, and end with the exit code; a complete study is told in seconds."""
    from muonlab.sweep.search import open_studies, remaining, replicate_jobs

    studies = open_studies(plan)
    left, total = remaining(studies, plan.search["trials"]), plan.search["trials"] * len(studies)
    jobs, folders = replicate_jobs(plan, studies, None)
    told = plan.folder / "report.txt"
    if not left and not jobs and told.exists():
        print(
            f"study {plan.name} is complete: {total} trials; search.trials=N asks for more\n{told.read_text()}",
            end="",
        )
        return 0 if all(folders.values()) else 3
    print(f"study {plan.name}: {total - left} of {total} trials done\n{plan.fairness()}", flush=True)
    told.unlink(missing_ok=True)
    folders = carry_out(plan, studies, left)
    return 0 if all(folders.values()) else 3


def carry_out(plan: Plan, studies: list, left: int) -> dict[str, list[Path]]:
    """Search, replicate and report; the folders of the replicates by optimizer."""
    from muonlab.sweep.pool import Pool, default_slots
    from muonlab.sweep.report import report
    from muonlab.sweep.search import replicate, replicate_jobs, search

    pool = Pool(plan.search["workers"] or default_slots(), plan.folder / "logs")
    parent = open_parent(plan)
    parent_run_id = parent and parent.run_id
    if left:
        search(plan, studies, pool, parent_run_id)
    jobs, folders = replicate_jobs(plan, studies, parent_run_id)
    if jobs:
        replicate(plan, jobs, folders, pool)
    text = report(plan, studies, folders)
    if plan.config["tracking"]["name"] == "mlflow":
        text += f"\nlook at every run: make ui, or {ui_command(plan.config)}\n"
    (plan.folder / "report.txt").write_text(text)
    print(text, end="")
    if parent is not None:
        parent.log_folder(plan.folder)
        parent.finish("finished")
    return folders


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
