"""The report of a search: each optimizer's best setting compared over fresh seeds, and every attempt."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.drawing.palette import styles
from analysis.tables import as_text, comparison_table, save_table
from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record.mlflow_link import Link
from muonlab.settings.search import SearchSettings
from muonlab.study.design import Design, searches
from muonlab.study.judging import Judgement
from muonlab.study.pool import remove_dead_sockets
from muonlab.study.queue import Queue
from muonlab.study.slots import Slot
from muonlab.study.storage import open_storage
from muonlab.study.study import FILE, Study
from muonlab.study.tuning import Best, best_levels, levels_by_arm
from muonlab.study.work import finished_run
from muonlab.train.config import RunConfig
from muonlab.train.run import run_folder


def fairness(design: Design, config: RunConfig) -> str:
    """The rule by which a search compares its optimizers, in one paragraph."""
    [search] = _searches(design)
    tokens = config.trainer.max_steps * config.trainer.sequences * config.model.context
    searched = {name: ", ".join(section.space) for name, section in search.optimizers.items()}
    settings = "; ".join(f"{name}: {names}" for name, names in searched.items())
    if len(set(searched.values())) == 1:
        settings = next(iter(searched.values()))
    seeds = ", ".join(map(str, search.replicate_seeds))
    return (
        f"Fairness: {search.trials} trials of each optimizer ({search.sampler}, published setting first), "
        f"{tokens:,} tokens each, searched settings {settings}; the best by validation loss repeated on the "
        f"fresh seeds {seeds}; only those runs enter the comparison."
    )


def finished_report(study: Study) -> str | None:
    """The report of a study whose runs are all over and shown in MLflow; None while anything is left to do."""
    report = study.folder / "report.txt"
    if not report.exists() or not (study.folder / FILE).exists() or not _shown(study):
        return None
    study.save()  # refuses a different study of this name
    queue = Queue(open_storage(study.storage, study.folder), study.name, study.design)
    slots = [queue.drawn(slot) for slot in study.slots()]
    if any(slot is None or finished_run(slot.config) is None for slot in slots) or queue.uncounted(
        study.slots()
    ):
        return None
    trained = [(slot, run_folder(slot.config)) for slot in slots if slot is not None]
    fresh = study.slots(levels_by_arm(best_levels(trained, study.design)))
    if not all(finished_run(slot.config) for slot in fresh) or queue.uncounted(fresh):
        return None
    remove_dead_sockets()
    return report.read_text(encoding="utf-8")


def _shown(study: Study) -> bool:
    """Whether MLflow has the study's results and its end; a server may have been out of reach."""
    if study.base().tracking.name == "none":
        return True
    try:
        link = Link.read(study.folder)
    except EnvironmentFault:
        raise
    except MuonlabError:  # a torn file, which the whole command writes again
        return False
    return link is not None and link.complete


def comparison_text(
    design: Design,
    queue: Queue,
    slots: Sequence[Slot],
    judgement: Judgement,
    tuned: Sequence[Best],
    out: Path,
) -> str:
    """The warnings and the comparison of a search; writes its tables into `out`."""
    searched = [slot for slot in slots if design.conditions[slot.condition].search is not None]
    attempts_table(queue, searched).to_csv(out / "trials.csv", index=False)
    lines = [f"warning: {best}" for best in tuned if best.edge]
    condition = _best_condition(design)
    runs = judgement.frames.runs
    runs = runs[runs["condition"] == condition]
    arms = list(dict.fromkeys(runs["arm"]))
    spent = {best.arm: best.tried for best in tuned}
    table = comparison_table(runs, "adamw" if "adamw" in arms else arms[0], spent)
    save_table(table, out, "comparison")
    seeds = ", ".join(map(str, design.seeds_of(condition)))
    return "\n".join(
        [*lines, f"\nThe best setting of each optimizer on the fresh seeds {seeds}:\n", as_text(table)]
    )


def story(design: Design, runs: pd.DataFrame) -> str:
    """What the largest multiple of each best learning rate did to the max logit and to the loss: a sentence each; ""
    where nothing was multiplied."""
    raised = [
        (name, max(factors)) for name, s in design.conditions.items() for factors in (s.times or {}).values()
    ]
    if not raised:
        return ""
    condition, factor = raised[-1]
    seeds = design.seeds_of(condition)
    usual = runs[(runs["condition"] == _best_condition(design)) & runs["seed"].isin(seeds)]
    beyond = runs[(runs["condition"] == condition) & (runs["level"] == factor)]
    sentences = []
    for column, quantity, digits in (
        ("end_max_logit", "max logit at the end", ".3g"),
        ("loss", "validation loss", ".3f"),
    ):
        before, after = (part.groupby("arm")[column].median() for part in (usual, beyond))
        changes = [
            f"{style.label} {before[arm]:{digits}} -> {after[arm]:{digits}}"
            for arm, style in styles(list(dict.fromkeys(beyond["arm"]))).items()
        ]
        sentences.append(
            f"From its best learning rate to {factor:g} times it, {quantity}: {', '.join(changes)}"
            f" (medians over {len(seeds)} seeds).\n"
        )
    return "".join(sentences)


def _best_condition(design: Design) -> str:
    [condition] = [n for n, section in design.conditions.items() if section.tuned_on and not section.times]
    return condition


def curves(
    design: Design, runs: pd.DataFrame, queue: Queue, slots: Sequence[Slot]
) -> dict[str, dict[int, float]]:
    """The charts of a study in MLflow: by trial the lowest loss so far of each optimizer, and at each whole multiple
    of its best rate the median of the final loss and of the max logit, in the sections of charts of its runs;
    runs: of `Frames`."""
    charts: dict[str, dict[int, float]] = {}
    for name, section in design.conditions.items():
        if section.search is not None:
            trials = attempts_table(queue, [slot for slot in slots if slot.condition == name])
            for arm, rows in trials.dropna(subset="value").sort_values("number").groupby("optimizer"):
                charts[f"loss/{name}: {arm} by trial"] = dict(enumerate(rows["value"].cummin(), 1))
        if any(len(multiples) > 1 for multiples in (section.times or {}).values()):
            here = runs[runs["condition"] == name].assign(
                level=lambda frame: pd.to_numeric(frame["level"], errors="coerce")
            )
            for arm, rows in here[here["level"] % 1 == 0].groupby("arm"):
                for group, metric in (("loss", "loss"), ("max_logit", "end_max_logit")):
                    medians = rows.groupby("level")[metric].median().dropna()
                    points = dict(zip(medians.index.astype(int), medians, strict=True))
                    charts[f"{group}/{name}: {arm} by multiple"] = points
    return charts


def attempts_table(queue: Queue, slots: Sequence[Slot]) -> pd.DataFrame:
    """A row per attempt at these slots: optimizer, slot, number, state, status, cause, value (nats) and setting."""
    arms = {slot.name: slot.arm for slot in slots}
    rows = [
        {
            "optimizer": arms[attempt.slot],
            "slot": attempt.slot,
            "number": attempt.number,
            "state": attempt.state,
            "status": attempt.status,
            "cause": attempt.cause,
            "value": attempt.value,
        }
        | attempt.setting
        for attempt in queue.attempts(slots)
    ]
    return pd.DataFrame(rows)


def _searches(design: Design) -> list[SearchSettings]:
    return [searches(design, name) for name, s in design.conditions.items() if s.search is not None]
