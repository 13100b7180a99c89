"""Train what is missing of an experiment, and carry the best levels of a search over to what is tuned on it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muonlab.errors import MuonlabError
from muonlab.experiment.cells import Cell, Level, cells
from muonlab.experiment.spec import searches

Trained = list[tuple[Cell, Path]]


@dataclass(frozen=True)
class Best:
    """The level with the lowest mean validation loss of an arm's search (nats; a diverged run has its first loss).

    edge: "lowest" or "highest" where it is the end of its range, so that a better one may lie beyond; else "".
    """

    condition: str
    arm: str
    level: Level
    loss: float
    tried: int
    edge: str

    def __str__(self) -> str:
        told = (
            f"{self.condition}/{self.arm}: best of {self.tried} levels is {self.level} (loss {self.loss:.4f})"
        )
        return told + (f", the {self.edge} tried: a better one may lie beyond" if self.edge else "")


def train_experiment(
    name: str, spec: Mapping[str, Any], overrides: list[str], workers: int | None, logs: Path
) -> tuple[Trained, list[Best]]:
    """Train in two stages, the tuned conditions last; every run with its folder, and what the searches chose."""
    trained = train_cells(cells(name, spec, overrides), workers, logs)
    if not searches(spec):
        return trained, []
    found = best_levels(trained, searches(spec))
    for best in found:
        print(best)
    chosen: dict[str, dict[str, Level]] = {}
    for best in found:
        chosen.setdefault(best.condition, {})[best.arm] = best.level
    return train_cells(cells(name, spec, overrides, chosen), workers, logs), found


def train_cells(todo: list[Cell], workers: int | None, logs: Path) -> Trained:
    """Train what is not finished, one process a run, and a run that several cells share once; each cell's folder.

    Raises MuonlabError, after all other runs ended, if one failed: its cause and its log.
    """
    from muonlab.sweep.pool import Job, Pool, default_slots
    from muonlab.sweep.search import finished_run
    from muonlab.train.config import resolve
    from muonlab.train.run import run_folder

    folders = [run_folder(resolve(cell.config)) for cell in todo]
    missing: dict[Path, Cell] = {}
    for cell, folder in zip(todo, folders, strict=True):
        if finished_run(cell.config) is None:
            missing.setdefault(folder, cell)
    done = sum(folder not in missing for folder in folders)
    print(f"{done} of {len(todo)} runs done", flush=True)
    failed = []
    if missing:
        pool = Pool(workers or default_slots(), logs)
        waiting = iter([Job(cell.config, cell.label) for cell in missing.values()])

        def on_result(job: Job, result: Any) -> None:
            pool.say(f"{job.label}  {result.status} {result.cause}".rstrip())
            if result.status not in ("finished", "diverged"):
                failed.append(f"{job.label} ({result.cause}; see {logs / job.label}.log)")

        steps = sum(cell.config["trainer"]["max_steps"] for cell in missing.values())
        pool.run(lambda: next(waiting, None), on_result, "experiment", len(missing), steps)
    if failed:
        raise MuonlabError(
            f"{len(failed)} runs failed; the same command tries them again: {'; '.join(failed)}"
        )
    return list(zip(todo, folders, strict=True))


def best_levels(trained: Trained, conditions: Iterable[str]) -> list[Best]:
    """The best level of every arm of `conditions`; of equal ones the first."""
    losses: dict[tuple[str, str], dict[Level, list[float]]] = {}
    for cell, folder in trained:
        if cell.condition in conditions:
            levels = losses.setdefault((cell.condition, cell.arm), {})
            levels.setdefault(cell.level, []).append(_loss(folder))
    found = []
    for (condition, arm), levels in losses.items():
        means = {level: float(np.mean(values)) for level, values in levels.items()}
        best = min(means, key=lambda level: math.inf if math.isnan(means[level]) else means[level])
        values = [level.value for level in levels]
        edge = ""
        if len(values) > 1 and all(isinstance(value, float) for value in values):
            edge = {min(values): "lowest", max(values): "highest"}.get(best.value, "")
        found.append(Best(condition, arm, best, means[best], len(levels), edge))
    return found


def _loss(folder: Path) -> float:
    from analysis.frames import settled_loss
    from muonlab.record import load_run

    run = load_run(folder)
    return settled_loss(
        run.metrics.get("val_loss", math.nan), float(run.steps["train_loss"].iloc[0]), run.status
    )
