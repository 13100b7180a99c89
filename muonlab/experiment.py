"""python -m muonlab.experiment NAME [overrides]: run or resume the runs of experiments/NAME.yaml, judge, draw."""

import os

# Read when torch loads OpenMP, so it must stand before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from muonlab.cli import compose_config, plain, project_folder, run_command
from muonlab.errors import MuonlabError, unknown_name

MADE = ("command", "commit", "dirty", "python", "packages", "platform", "cpu", "cores", "accelerators")


@dataclass(frozen=True)
class Cell:
    """One run of an experiment: where it stands in the design, and its resolved config."""

    condition: str
    arm: str
    seed: int
    config: dict[str, Any]

    @property
    def label(self) -> str:
        """A name for logs and progress."""
        return f"{self.condition}-{self.arm}-s{self.seed}"


def load_experiment(name: str) -> dict[str, Any]:
    """The contents of experiments/<name>.yaml. Raises MuonlabError for an unknown name, with the near ones."""
    path = project_folder("experiments") / f"{name}.yaml"
    if not path.exists():
        raise unknown_name("experiment", name, [p.stem for p in path.parent.glob("*.yaml")])
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def cells(name: str, spec: dict[str, Any], overrides: list[str]) -> list[Cell]:
    """Every run of the experiment, seeds outermost, so that an interrupted one has whole rounds of all arms.

    `overrides` are Hydra overrides of every run, after the experiment's own; `seed=...` is refused, since the seeds are
    the design's.
    """
    if any(o.lstrip("+").startswith("seed=") for o in overrides):
        raise MuonlabError("the seeds are the experiment's own; change `seeds` in its file")
    found = []
    for condition, section in spec["conditions"].items():
        for arm, arm_overrides in section["arms"].items():
            # The group choice stands first: `optimizer=muon` would wipe out an earlier optimizer.weight_decay.
            groups = [o for o in arm_overrides if "." not in o.partition("=")[0]]
            values = [o for o in arm_overrides if o not in groups]
            shared = [*spec["common"], *section.get("common", ())]
            config = plain(
                compose_config("train", [*groups, *shared, *values, "trainer.progress=false", *overrides])
            )
            tracking = {"study": name, "role": f"{condition}/{arm}"}
            if config["tracking"]["name"] != "none":
                config["tracking"] |= tracking
            found += [Cell(condition, arm, seed, config | {"seed": seed}) for seed in spec["seeds"]]
    return sorted(found, key=lambda cell: spec["seeds"].index(cell.seed))


def train_cells(todo: list[Cell], workers: int | None, logs: Path) -> dict[int, Path]:
    """Train what is not finished, one process a run; the folder of every cell by its place in `todo`.

    Raises MuonlabError, after all other runs ended, if one failed: its cause and its log.
    """
    from muonlab.sweep.pool import Job, Pool, default_slots
    from muonlab.sweep.search import finished_run

    folders = {id(cell): finished_run(cell.config) for cell in todo}
    missing = [cell for cell in todo if folders[id(cell)] is None]
    print(f"{len(todo) - len(missing)} of {len(todo)} runs done", flush=True)
    failed = []
    if missing:
        pool = Pool(workers or default_slots(), logs)
        waiting = iter([Job(cell.config, cell.label, cell) for cell in missing])

        def on_result(job: Job, result: Any) -> None:
            pool.say(f"{job.label}  {result.status} {result.cause}".rstrip())
            folders[id(job.about)] = result.folder
            if result.status not in ("finished", "diverged"):
                failed.append(f"{job.label} ({result.cause}; see {logs / job.label}.log)")

        steps = sum(cell.config["trainer"]["max_steps"] for cell in missing)
        pool.run(lambda: next(waiting, None), on_result, "experiment", len(missing), steps)
    if failed:
        raise MuonlabError(
            f"{len(failed)} runs failed; the same command tries them again: {'; '.join(failed)}"
        )
    return {index: folders[id(cell)] for index, cell in enumerate(todo)}


def judge_and_draw(
    name: str, spec: dict[str, Any], todo: list[Cell], folders: Any, out: Path, command: str
) -> None:
    """Write tables, verdicts and figures of the finished runs into `out`, and print the answers."""
    import pandas as pd

    from analysis.archive import choose, save_frames, stack
    from analysis.claims import answer
    from analysis.frames import collect
    from analysis.judge import judge_harmless, judge_runs, judge_switch, summarise
    from analysis.redraw import redraw
    from analysis.tables import as_text, save_table, verdict_table
    from muonlab.record import collect_environment

    grouped: dict[str, dict[str, list[Path]]] = {}
    for index, cell in enumerate(todo):
        grouped.setdefault(cell.condition, {}).setdefault(cell.arm, []).append(folders[index])
    frames = stack({condition: collect(arms) for condition, arms in grouped.items()})
    parts = []
    for condition, section in spec["conditions"].items():
        chosen = choose(frames, [condition])
        parts.append(judge_runs(chosen).assign(condition=condition))
        if "windows" in section:
            parts.append(judge_switch(chosen, section["windows"]).assign(condition=condition))
    verdicts = pd.concat(parts, ignore_index=True)
    answers = pd.DataFrame([answer(claim, frames, verdicts) for claim in spec["claims"]])
    for pair in spec.get("harmless", ()):
        runs = choose(frames, [pair["condition"]]).runs
        verdict = judge_harmless(runs, pair["arm"], pair["baseline"])
        words = {True: "reproduced", False: "not reproduced", None: "not testable"}
        row = {"claim": f"The clip is harmless at a {pair['condition']} learning rate", "source": "K2 App. D"}
        answers.loc[len(answers)] = row | {
            "n": runs["seed"].nunique(),
            "effect": verdict.sentence,
            "verdict": words[verdict.holds],
        }

    save_frames(frames, out)
    (out / "experiment.yaml").write_text(
        yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    environment = collect_environment() | {"command": command}
    made = {key: environment[key] for key in MADE} | {"date": datetime.now(UTC).date().isoformat()}
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    verdicts.to_csv(out / "verdicts.csv", index=False, float_format="%.6g", lineterminator="\n")
    (out / "verdict.json").write_text(answers.to_json(orient="records", indent=1) + "\n", encoding="utf-8")
    save_table(answers, out, "answers")
    print(f"\n{name}: {' '.join(spec['question'].split())}\n")
    for condition in spec["conditions"]:
        print(f"{condition}: verdict held in runs / judged runs (median value)")
        print(as_text(verdict_table(summarise(verdicts[verdicts["condition"] == condition]))), end="\n\n")
    for row in answers.itertuples():
        print(f"{row.verdict:<15}{row.claim} [{row.source}]\n{'':15}{row.effect} (n = {row.n})")
    print("\nwritten:")
    for path in [out / "answers.md", out / "verdicts.csv", *redraw(out)]:
        print(f"  {path}")


def main() -> int:
    """Exit code: 0 done, 2 a mistake in the command or failed runs, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m muonlab.experiment", description=__doc__.partition(": ")[2]
    )
    parser.add_argument("name", help="a file of experiments/, without .yaml")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of every run, e.g. trainer.device=cuda")
    parser.add_argument(
        "--workers", type=int, default=None, help="runs at once (default: GPUs, or else cores)"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where NAME/ is written")
    arguments = parser.parse_args()
    spec = load_experiment(arguments.name)
    todo = cells(arguments.name, spec, arguments.overrides)
    command = " ".join(["python -m muonlab.experiment", arguments.name, *arguments.overrides])
    print(f"{arguments.name}: {len(todo)} runs, about {spec['minutes']} minutes on two cores")
    folders = train_cells(todo, arguments.workers, Path("studies") / arguments.name / "logs")
    judge_and_draw(arguments.name, spec, todo, folders, arguments.results / arguments.name, command)
    return 0


if __name__ == "__main__":
    run_command(main)
