"""python -m analysis.evidence FOLDER: gather every experiment's answers there in FOLDER/README.md, a row a claim."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.frames import rows_of
from analysis.kept import read_mapping, read_rows, read_table
from analysis.tables import as_markdown
from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError

VERDICTS = ("reproduced", "not reproduced", "opposite", "tie", "not testable")
COLUMNS = [
    "id",
    "claim",
    "source",
    "n",
    "effect",
    "verdict",
    "contradicts",
    "side",
    "figure",
    "note",
    "command",
]
# What an experiment said before it ran, in the order of a page.
SAID = {
    "prediction": "Prediction",
    "source": "Source",
    "held_equal": "Held equal",
    "tuning": "Tuning",
    "primary": "Primary measure",
}
METHOD = """
Arms of one condition share their seeds, and a seed fixes initialisation and batch order, so differences are
taken seed by seed. Brackets hold the 95 % t interval of the mean over n seeds (of the mean logarithm for a
ratio, written x). A verdict that is passed on each run comes with the exact 95 % interval of the share of such
runs (0 of 5 leaves up to half open) and the median of its value with the smallest and largest. The noise floor
is the standard deviation over seeds, pooled over both arms, and at least 0.003 nats: a mean difference inside
it is a tie, whatever its sign. p is of the paired t test, corrected by Holm's method for all comparisons of an
experiment; from 0.05 on it is a tie. A diverged run stays in, with the loss that it started from; a target that
was never reached counts as reached at the end. Spikes are searched in the raw trace. Settings that were tuned
were tuned on other seeds than those that judge them. What each verdict means is written out in
[experiments/README.md](../experiments/README.md).
"""


@dataclass(frozen=True)
class Experiment:
    """What one folder of results/ says: its file, how it was made, and its answers (COLUMNS)."""

    name: str
    spec: dict[str, Any]
    made: dict[str, Any]
    answers: pd.DataFrame
    figures: list[str]
    runs: int

    @property
    def question(self) -> str:
        """The question in one line."""
        return " ".join(self.spec["question"].split())

    @property
    def said(self) -> dict[str, str]:
        """What its file said before it ran, by heading, as far as it does."""
        return {
            title: " ".join(str(self.spec[key]).split()) for key, title in SAID.items() if self.spec.get(key)
        }


def load_evidence(folder: Path) -> list[Experiment]:
    """Every experiment kept in `folder`, by name. Raises MuonlabError where there is none."""
    found = [_load(path.parent) for path in sorted(folder.glob("*/experiment.yaml"))]
    if not found:
        raise MuonlabError(f"no experiment is kept in {folder}; make ablation makes the first")
    return found


def evidence(experiments: list[Experiment]) -> str:
    """The page in Markdown: totals, contradictions between papers, then every experiment with its claims. The same
    experiments give the same text."""
    claims = pd.concat([e.answers for e in experiments], ignore_index=True)
    asked = [e for e in experiments if len(e.answers)]
    counts = claims["verdict"].value_counts()
    totals = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS)
    parts = [
        "# The evidence",
        f"{len(claims)} claims, judged by code in {len(asked)} experiments with {sum(e.runs for e in asked)} runs: "
        f"{totals}. This page is written by `python -m analysis.evidence results`; `make figures` redraws the figures "
        "from the tables beside them.",
        "## Method",
        METHOD.strip(),
    ]
    disputed = claims[claims["contradicts"] != ""].sort_values("contradicts", kind="stable")
    if len(disputed):
        table = _rows(disputed, ["contradicts", "claim", "n", "effect", "verdict", "side", "figure"])
        parts += ["## Where papers disagree", as_markdown(table)]
    for experiment in experiments:
        parts += [f"## {experiment.name}", experiment.question, *_section(experiment)]
    return "\n\n".join(parts) + "\n"


def write_evidence(folder: Path) -> Path:
    """Write `folder`/README.md, whole or not at all; its path."""
    path = folder / "README.md"
    draft = folder / f".README.{os.getpid()}.md"
    draft.write_text(evidence(load_evidence(folder)), encoding="utf-8")
    draft.replace(path)
    return path


def _load(folder: Path) -> Experiment:
    spec, made = read_mapping(folder / "experiment.yaml"), read_mapping(folder / "made.json")
    kept = folder / "verdict.json"
    rows = read_rows(kept) if kept.exists() else []
    answers = pd.DataFrame(rows).reindex(columns=COLUMNS).astype(object)
    answers = answers.where(answers.notna(), "").assign(experiment=folder.name)
    figures = [figure["name"] for figure in spec.get("figures", ())]
    table = folder / "runs.csv"
    runs = len(read_table(table, ["run"])) if table.exists() else 0
    return Experiment(folder.name, spec, made, answers, figures, runs)


def _section(experiment: Experiment) -> list[str]:
    answers = experiment.answers
    parts = [
        f"{title}: {experiment.said[title]}{'' if experiment.said[title].endswith('.') else '.'}"
        for title in ("Prediction", "Held equal", "Tuning")
        if title in experiment.said
    ]
    if len(answers):
        table = _rows(answers, ["claim", "source", "n", "effect", "verdict", "figure"])
        parts.append(as_markdown(table))
    notes = dict.fromkeys(note for row in answers["note"] for note in row.split("; ") if note)
    parts += [f"Searched: {note}." for note in notes]
    links = ", ".join(f"[{name}]({experiment.name}/{name}.png)" for name in experiment.figures)
    shown = f" Figures: {links}." if links else ""
    return [*parts, f"{_made(experiment)}{shown}"]


def _made(experiment: Experiment) -> str:
    made = experiment.made
    trained = made.get("runs", {})
    commits = [commit[:9] for commit in trained.get("commits", [made.get("commit") or "unknown"])]
    told = [f"Repeat: `{made['command']}`"]
    if experiment.runs:
        changed = f", {trained['dirty']} with uncommitted changes" if trained.get("dirty") else ""
        told.append(f"{experiment.runs} runs, trained at {', '.join(commits)}{changed}")
    hardware = [*trained.get("accelerators", made.get("accelerators", ())), *trained.get("cpu", ())]
    told += [", ".join(hardware)] if hardware else []
    told += [made["date"]] if "date" in made else []
    return "; ".join(told) + "."


def _rows(answers: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    table = answers.copy()
    table["figure"] = [
        f"[{row.figure}]({row.experiment}/{row.figure}.png)" if row.figure else "" for row in rows_of(table)
    ]
    table["n"] = ["" if n == "" else f"{n:.0f}" for n in table["n"]]
    table["verdict"] = "**" + table["verdict"] + "**"
    return table[columns].rename(
        columns={
            "contradicts": "disagreement",
            "side": "this evidence is on the side of",
            "effect": "effect [95 %]",
        }
    )


def main() -> None:
    """Raises MuonlabError where there is nothing to gather."""
    parser = argument_parser("analysis.evidence", __doc__.partition(": ")[2])
    parser.add_argument("folder", type=Path, help="results/")
    print(write_evidence(parser.parse_args().folder))


if __name__ == "__main__":
    run_command(main)
