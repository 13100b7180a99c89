"""Judge a study's finished runs: tables, tests of runs and answers to claims, in the folder of its results."""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from analysis.archive import read_made, read_mapping, save_frames, save_outcomes
from analysis.frames import Frames, collect, stack
from analysis.readings import Readings
from analysis.run_tests import apply_tests, summarise
from analysis.tables import as_text, outcome_table
from muonlab.record import collect_environment, load_run
from muonlab.study.answering import Material, Searched, write_answers, write_design
from muonlab.study.design import Design
from muonlab.study.study import Study
from muonlab.study.tuning import Best, Trained

MADE = ("command", "commit", "dirty", "python", "packages", "platform", "cpu", "cores", "accelerators")


@dataclass(frozen=True)
class Judgement:
    """The frames of all runs, the outcomes of their tests, and a row of ANSWER_COLUMNS per claim."""

    frames: Frames
    outcomes: pd.DataFrame
    answers: pd.DataFrame


def judge(study: Study, trained: Trained, tuned: list[Best], out: Path) -> Judgement:
    """Write the finished runs' tables, tests and answers into `out`, from which figures are drawn."""
    frames, outcomes = gather(study.design, trained)
    added = added_seeds(study.design, out)
    save_frames(frames, out)
    made = provenance(trained, study.command) | {"date": datetime.now(UTC).date().isoformat()}
    made |= {"added_seeds": added} if added else {}
    # In this order: a kill in between loses no seed that was added, which is found by the old design.
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    write_design(study.design, out)
    if tuned:
        table = pd.DataFrame([vars(best) | {"level": str(best.level)} for best in tuned]).drop(
            columns="sides"
        )
        table.to_csv(out / "tuned.csv", index=False, float_format="%.6g", lineterminator="\n")
    save_outcomes(outcomes, out)
    searched = [Searched(best.condition, best.arm, str(best), bool(best.edge)) for best in tuned]
    material = Material(frames, outcomes, searched, added)
    answers = write_answers(study.name, study.design, study.command, material, out)
    frames.readings.save(out / "readings.csv")
    return Judgement(frames, outcomes, answers)


def added_seeds(design: Design, out: Path) -> dict[str, list[int]]:
    """{condition: seeds that an earlier judgement into this folder did not have}, those found before included."""
    if not (out / "experiment.yaml").exists() or not (out / "made.json").exists():
        return {}
    before = read_mapping(out / "experiment.yaml")
    added = {name: set(seeds) for name, seeds in read_made(out).get("added_seeds", {}).items()}
    for name in design.conditions:
        section = before.get("conditions", {}).get(name)
        if section is not None and (old := set(section.get("seeds") or before["seeds"])):
            new = set(design.seeds_of(name))
            if old < new:
                added[name] = added.get(name, set()) | (new - old)
    return {name: sorted(seeds) for name, seeds in added.items() if name in design.conditions}


def gather(design: Design, trained: Trained) -> tuple[Frames, pd.DataFrame]:
    """The frames of all runs, with `condition` and `level` (None where nothing varies), and the outcomes of
    their tests.

    Conditions are read one at a time, and the traces of single heads, which are the bulk of a record, are dropped after
    judging unless the condition has `heads: true`.
    """
    parts, outcomes = {}, []
    for condition, section in design.conditions.items():
        ended = [(slot, folder) for slot, folder in trained if slot.condition == condition]
        arms: dict[str, list[Path]] = {arm: [] for arm in design.arms_of(condition)}
        for slot, folder in ended:
            arms[slot.arm].append(folder)
        named = [(slot.arm, folder.name, slot.level.value) for slot, folder in ended]
        levels = pd.DataFrame(named, columns=["arm", "run", "level"])
        tables = collect(arms).tables.items()
        frames = Frames(
            **{n: table.merge(levels, on=["arm", "run"], how="left") for n, table in tables},
            readings=Readings(),
        )
        outcomes.append(apply_tests(frames, section.windows).assign(condition=condition))
        heads = frames.heads if section.heads else frames.heads.head(0)
        parts[condition] = replace(frames, heads=heads)
    return stack(parts), pd.concat(outcomes, ignore_index=True)


def answers_text(design: Design, judgement: Judgement, tuned: list[Best]) -> str:
    """The closing text of an experiment: the tests of its runs by condition, the best levels, and the answers."""
    lines, outcomes = [], judgement.outcomes
    for condition in design.conditions:
        lines.append(f"{condition}: runs that pass a test / runs that could be judged (median value)")
        lines += [as_text(outcome_table(summarise(outcomes[outcomes["condition"] == condition]))), ""]
    lines += map(str, tuned)
    for row in judgement.answers.to_dict("records"):
        lines.append(f"{row['answer']:<15}{row['claim']} [{row['source']}]")
        lines.append(f"{'':15}{row['effect']} (n = {row['n']})")
        lines += [f"{'':15}{row['why']}"] if row["why"] else []
        if row["side"]:
            lines.append(f"{'':15}{row['contradicts']}: this evidence is on the side of {row['side']}")
    return "\n".join(lines)


def provenance(trained: Trained, command: str) -> dict[str, object]:
    """The command that repeats it, the commit that judged, and the commits and hardware that trained the runs."""
    judge = replace(collect_environment(), command=command).values()
    runs = [load_run(folder).environment for _, folder in trained]
    return {key: judge[key] for key in MADE} | {
        "runs": {
            "commits": sorted({run.commit or "unknown" for run in runs}),
            "dirty": sum(bool(run.dirty) for run in runs),
            "cpu": sorted({run.cpu for run in runs}),
            "accelerators": sorted({name for run in runs for name in run.accelerators}),
        }
    }
