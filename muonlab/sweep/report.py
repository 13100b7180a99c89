"""What a sweep ends with: the comparison over fresh seeds, what was searched, the figures."""

from pathlib import Path
from typing import Any

import pandas as pd
from optuna.trial import TrialState

from muonlab.sweep.plan import Plan
from muonlab.sweep.space import edge
from muonlab.sweep.study import OptimizerStudy


def report(plan: Plan, studies: list[OptimizerStudy], replicates: dict[str, list[Path]]) -> str:
    """The text that a sweep ends with; its tables and figures are written into the study's folder."""
    from analysis.frames import collect
    from analysis.tables import as_text, comparison_table, save_table

    trials = trials_table(studies)
    trials.to_csv(plan.folder / "trials.csv", index=False)
    lines = [f"warning: {line}" for study in studies for line in warnings(study)]
    files = [plan.folder / "trials.csv"]
    finished = {name: folders for name, folders in replicates.items() if folders}
    if finished:
        frames = collect(finished)
        spent = {study.optimizer: len(study.counted()) for study in studies}
        table = comparison_table(frames.runs, "adamw" if "adamw" in finished else next(iter(finished)), spent)
        files.append(save_table(table, plan.folder, "comparison")["csv"])
        seeds = ", ".join(map(str, plan.search["replicate_seeds"]))
        lines += [f"\nThe best setting of each optimizer on the fresh seeds {seeds}:\n", as_text(table)]
        files += figures(plan, frames, trials)
    return "\n".join([*lines, "\nwritten:", *(f"  {path}" for path in files)]) + "\n"


def trials_table(studies: list[OptimizerStudy]) -> pd.DataFrame:
    """Every trial: optimizer, number, role, attempt, state, status, cause, value, its settings and run folder."""
    rows: list[dict[str, Any]] = []
    for study in studies:
        for trial in study.study.get_trials(deepcopy=False):
            about = {
                key: trial.user_attrs.get(key) for key in ("role", "attempt", "status", "cause", "folder")
            }
            value = trial.value if trial.state == TrialState.COMPLETE else None
            rows.append(
                {
                    "optimizer": study.optimizer,
                    "number": trial.number,
                    "state": trial.state.name,
                    "value": value,
                }
                | about
                | trial.params
            )
    return pd.DataFrame(rows)


def warnings(study: OptimizerStudy) -> list[str]:
    """What a reader should know before believing the comparison."""
    best, failed = study.best(), [t for t in study.counted() if t.state == TrialState.FAIL]
    lines = [f"{study.optimizer}: trial {t.number} failed ({t.user_attrs.get('cause')})" for t in failed]
    if best is None:
        return [*lines, f"{study.optimizer}: no trial finished"]
    for name, distribution in study.space.items():
        if where := edge(distribution, best.params[name]):
            lines.append(
                f"{study.optimizer}: the best {name} ({best.params[name]:.3g}) lies on the {where} edge of its range "
                f"[{distribution.low:g}, {distribution.high:g}]; widen the space"
            )
    return lines


def figures(plan: Plan, replicates: Any, trials: pd.DataFrame) -> list[Path]:
    """Spike against stable over the fresh seeds, and the validation loss of all search trials over learning rate."""
    from analysis.compose import draw
    from analysis.frames import collect
    from analysis.redraw import made_by
    from muonlab.record import collect_environment

    made = made_by(collect_environment() | {"command": f"python -m muonlab.sweep study={plan.name}"})
    taus = {section["tau"] for section in plan.optimizers.values() if section.get("tau")}
    spec = {
        "name": "spike-vs-stable",
        "kind": "spike_vs_stable",
        "about": "Best setting of each optimizer over fresh seeds.",
        "tau": taus.pop() if len(taus) == 1 else None,
    }
    files = draw(spec, replicates, plan.folder / "figures", made)
    paths = [files["png"], files["pdf"]]
    searched = trials[trials["folder"].notna()].groupby("optimizer", sort=False)["folder"].agg(list).to_dict()
    frames = collect(searched)
    if frames.runs["val_loss"].notna().any():
        spec = {
            "name": "lr-sensitivity",
            "kind": "lr_sensitivity",
            "about": "Every search trial; other settings vary too.",
        }
        files = draw(spec, frames, plan.folder / "figures", made)
        paths += [files["png"], files["pdf"]]
    return paths
