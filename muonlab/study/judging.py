"""Judge a study's finished runs: tables, tests of runs and answers to claims, in the folder of its results."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import yaml

from analysis.answers import answer_all
from analysis.archive import save_frames
from analysis.claims import Claim
from analysis.frames import Frames, collect, stack
from analysis.run_tests import apply_tests, summarise
from analysis.tables import as_text, outcome_table, save_table
from muonlab.record import collect_environment, load_run
from muonlab.study.design import Design, Figure
from muonlab.study.study import Study
from muonlab.study.tuning import Best, Trained

# The columns of answers.json, in this order.
ANSWER_COLUMNS = [
    *(
        "id",
        "claim",
        "source",
        "question",
        "conditions",
        "arm",
        "n",
        "effect",
        "estimate",
        "low",
        "high",
        "unit",
    ),
    *("floor", "p", "p_holm", "answer", "contradicts", "side", "figure", "note", "command"),
]
MADE = ("command", "commit", "dirty", "python", "packages", "platform", "cpu", "cores", "accelerators")


@dataclass(frozen=True)
class Judgement:
    """The frames of all runs, the outcomes of their tests, and a row of ANSWER_COLUMNS per claim."""

    frames: Frames
    outcomes: pd.DataFrame
    answers: pd.DataFrame


def judge(study: Study, trained: Trained, tuned: list[Best], out: Path) -> Judgement:
    """Write the tables, tests and answers of the finished runs into `out`; figures are drawn from there."""
    design = study.design
    frames, outcomes = gather(design, trained)
    claims = design.all_claims()
    question = " ".join(design.question.split())
    rows = []
    for number, (claim, answer) in enumerate(
        zip(claims, answer_all(claims, frames, outcomes), strict=True), start=1
    ):
        notes = [str(best) for best in tuned if best.edge and _rests_on(claim, best, design)]
        row = vars(answer) | {"id": f"{study.name}-{number:02d}", "question": question}
        row |= {"figure": figure_of(claim, design.figures), "command": study.command}
        rows.append(row | {"note": "; ".join(notes)})

    save_frames(frames, out)
    text = yaml.safe_dump(design.as_mapping(), sort_keys=False, allow_unicode=True)
    (out / "experiment.yaml").write_text(text, encoding="utf-8")
    made = provenance(trained, study.command) | {"date": datetime.now(UTC).date().isoformat()}
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if tuned:
        table = pd.DataFrame([vars(best) | {"level": str(best.level)} for best in tuned])
        table.to_csv(out / "tuned.csv", index=False, float_format="%.6g", lineterminator="\n")
    outcomes.to_csv(out / "tests.csv", index=False, float_format="%.6g", lineterminator="\n")
    answers = pd.DataFrame(rows, columns=ANSWER_COLUMNS)
    (out / "answers.json").write_text(
        answers.to_json(orient="records", indent=1, double_precision=6) + "\n", encoding="utf-8"
    )
    columns = ["claim", "source", "n", "effect", "answer", *(c for c in ("side", "note") if answers[c].any())]
    save_table(answers[columns], out, "answers")
    return Judgement(frames, outcomes, answers)


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
        tables = vars(collect(arms)).items()
        frames = Frames(**{n: table.merge(levels, on=["arm", "run"], how="left") for n, table in tables})
        outcomes.append(apply_tests(frames, section.windows).assign(condition=condition))
        heads = frames.heads if section.heads else frames.heads.head(0)
        parts[condition] = replace(frames, heads=heads)
    return stack(parts), pd.concat(outcomes, ignore_index=True)


def figure_of(claim: Claim, figures: Sequence[Figure]) -> str:
    """The figure that shows a claim: the one it names, or the first that draws its conditions and arm; "" if none
    does."""
    if claim.figure:
        return claim.figure
    conditions = set(claim.side.conditions)
    for figure in figures:
        if figure.draws(conditions, claim.side.arm):
            return figure.name
    return ""


def _rests_on(claim: Claim, best: Best, design: Design) -> bool:
    tuned_on = {design.conditions[condition].tuned_on for condition in claim.side.conditions}
    return best.condition in tuned_on and best.arm in claim.arms


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
