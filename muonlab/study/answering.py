"""The answers to a study's claims, with what its searches and its looks say against them: written beside its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from analysis.answers import ANSWER_COLUMNS, Circumstance, answer_all
from analysis.archive import TESTS, load_frames, read_made, read_table
from analysis.claims import Claim
from analysis.frames import Frames, rows_of
from analysis.inference import SIGNIFICANT, alpha_spent
from analysis.tables import save_table
from muonlab.study.design import Design, Figure
from muonlab.study.tuning import stored_best


@dataclass(frozen=True)
class Searched:
    """What a search chose for an arm, in words, and whether that is at the edge of its range."""

    condition: str
    arm: str
    text: str
    edge: bool


@dataclass(frozen=True)
class Material:
    """What the answers of an experiment rest on: its tables, the outcomes of the tests of its runs, what its searches
    chose, and {condition: seeds that were added after a first judgement}."""

    frames: Frames
    outcomes: pd.DataFrame
    searched: Sequence[Searched] = ()
    added_seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)


def judge_again(out: Path, design: Design) -> None:
    """Answer the claims of `design` from the tables in `out`, without the runs; nothing but the answers is written.

    A measure that needs every step of a run is known from readings.csv; one that was not asked for then says that the
    kept steps are too few.
    """
    made, path = read_made(out), out / "tuned.csv"
    table = read_table(path).astype(object) if path.exists() else pd.DataFrame()
    table = table.where(table.notna(), "")
    searched = [Searched(row.condition, row.arm, stored_best(row), bool(row.edge)) for row in rows_of(table)]
    frames, outcomes = load_frames(out), read_table(out / TESTS)
    material = Material(frames, outcomes, searched, made.get("added_seeds", {}))
    write_answers(out.name, design, made["command"], material, out)
    write_design(design, out)


def write_answers(name: str, design: Design, command: str, material: Material, out: Path) -> pd.DataFrame:
    """The answers to the design's claims as a table of ANSWER_COLUMNS, written into `out` as answers.*."""
    claims, searched = design.all_claims(), material.searched
    question = " ".join(design.question.split())
    known = [_circumstance(claim, design, searched) for claim in claims]
    answers = answer_all(claims, material.frames, material.outcomes, known)
    rows = []
    for number, (claim, answer) in enumerate(zip(claims, answers, strict=True), start=1):
        notes = [best.text for best in searched if best.edge and _rests_on(claim, best, design)]
        notes += _added_note(claim, design, material.added_seeds)
        row = vars(answer) | {"id": f"{name}-{number:02d}", "question": question}
        row |= {"figure": figure_of(claim, design.figures), "command": command}
        rows.append(row | {"note": "; ".join(notes)})
    table = pd.DataFrame(rows, columns=ANSWER_COLUMNS)
    (out / "answers.json").write_text(
        table.to_json(orient="records", indent=1, double_precision=10) + "\n", encoding="utf-8"
    )
    shown = [
        "claim",
        "source",
        "n",
        "effect",
        "answer",
        *(c for c in ("why", "side", "note") if table[c].any()),
    ]
    save_table(table[shown], out, "answers")
    return table


def write_design(design: Design, out: Path) -> None:
    """Write the design into `out` as experiment.yaml."""
    text = yaml.safe_dump(design.as_mapping(), sort_keys=False, allow_unicode=True)
    (out / "experiment.yaml").write_text(text, encoding="utf-8")


def _circumstance(claim: Claim, design: Design, searched: Sequence[Searched]) -> Circumstance:
    """What speaks against an answer: a search that ended at the edge of its range; an error that a look may spend."""
    edges = [best for best in searched if best.edge and _rests_on(claim, best, design)]
    alpha = SIGNIFICANT
    if design.looks:
        alpha = alpha_spent(len(design.seeds_of(claim.side.conditions[0])), design.looks)
    if not edges:
        return Circumstance(alpha=alpha)
    arms = " and ".join(dict.fromkeys(best.arm for best in edges))
    return Circumstance(untestable=f"the search for {arms} ended at the edge of its range", alpha=alpha)


def _added_note(claim: Claim, design: Design, added: Mapping[str, Sequence[int]]) -> list[str]:
    seeds = sorted({seed for name in claim.side.conditions for seed in added.get(name, ())})
    if not seeds or design.looks:
        return []
    return [f"seeds {', '.join(map(str, seeds))} were added after a first answer"]


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


def _rests_on(claim: Claim, best: Searched, design: Design) -> bool:
    tuned_on = {design.conditions[condition].tuned_on for condition in claim.side.conditions}
    return best.condition in tuned_on and best.arm in claim.arms
