"""python -m analysis.evidence FOLDER: gather every experiment's answers there in FOLDER/README.md, a row per claim."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pandas as pd

from analysis.answers import ANSWER_COLUMNS, correct_page
from analysis.archive import Made, TrainedBy, kept_in, read_made, read_mapping, read_rows, read_table
from analysis.claims import ANSWERS, SETTLED
from analysis.frames import rows_of
from analysis.tables import as_markdown
from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError

TEMPLATES = Path(__file__).with_name("templates")
TITLES = {
    "contradicts": "disagreement",
    "side": "this evidence is on the side of",
    "effect": "effect [95 %]",
    "why": "what keeps it from saying more",
}
KNOWN, UNKNOWN, FRONT = 10, 3, 3  # sentences that the page opens with, at most, and the project's README
MARK = re.compile("<!-- findings -->")
ABOUT = re.compile(r"^(?P<sentence>.*?)\.?(?: \((?P<about>[^()]*)\))?$")
# What an experiment's file said before it ran, in the order of a page.
SAID = {
    "prediction": "Prediction",
    "source": "Source",
    "held_equal": "Held equal",
    "tuning": "Tuning",
    "primary": "Primary measure",
}
METHOD = """
Arms of one condition share their seeds, and a seed fixes initialisation and batch order, so
differences are taken seed by seed. Brackets hold the 95 % t interval of the mean over n seeds (of the mean logarithm
for a ratio, written x). A test that is applied to each run comes with the exact 95 % interval of the share of runs in
which it holds and the median of its value with the smallest and largest. p is two-sided, corrected by Holm's method
for all claims of an experiment; q is the false discovery rate at which an answer still holds among all tests of this
page (Benjamini and Hochberg), those of equivalence included; a comparison that two experiments make from the same runs
counts once. A claim is reproduced or contradicted where both are
below 0.05. Two mean losses within 0.003 nats, and two max logits within a factor of 1.25, are equivalent where two
one-sided tests say so, unless a file argues for another margin before its runs. A remedy is judged on the seeds whose
control showed what it is a remedy for; absence contradicts nothing where its cause was not there or the runs were too
few. A search that ended at the edge of its range answers nothing. A diverged run stays in, with the loss that it
started from; a target that was never reached counts as reached at the end. Spikes are searched in the raw trace.
Settings that were tuned were tuned on other seeds than those that judge them. What each answer means is written out
in [experiments/README.md](../experiments/README.md).
"""


class AnswerRow(Protocol):
    """A row of answers: an `Answer`, and what its study says of it."""

    experiment: str
    headline: str
    effect: str
    n: int
    figure: str
    why: str


@dataclass(frozen=True)
class Experiment:
    """One folder of results/: its file, how it was made, its answers (a row per claim, with `q` over the page), the
    names of its figures, and how many runs it has."""

    name: str
    spec: Mapping[str, object]
    made: Made
    answers: pd.DataFrame
    figures: list[str]
    runs: int

    @property
    def question(self) -> str:
        """The question in one line."""
        return " ".join(str(self.spec["question"]).split())

    @property
    def seeds(self) -> str:
        """The seeds of its runs; "" where each condition has its own."""
        seeds = self.spec.get("seeds", ())
        return ", ".join(map(str, seeds)) if isinstance(seeds, Sequence) else str(seeds)

    @property
    def published(self) -> pd.DataFrame:
        """The answers to claims of papers."""
        return self.answers[~self.answers["own"].astype(bool)]

    @property
    def said(self) -> dict[str, str]:
        """What its file said before it ran, by heading."""
        return {
            title: " ".join(str(self.spec[key]).split()) for key, title in SAID.items() if self.spec.get(key)
        }

    @property
    def notes(self) -> list[str]:
        """The notes of its answers on the searches behind them, each once."""
        return list(dict.fromkeys(note for row in self.answers["note"] for note in row.split("; ") if note))

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return self.made["command"]

    @property
    def commits(self) -> str:
        """The commits that trained its runs, shortened."""
        commits = self._trained.get("commits", [self.made.get("commit") or "unknown"])
        return ", ".join(commit[:9] for commit in commits)

    @property
    def dirty(self) -> int:
        """How many runs were trained with uncommitted changes; of one without runs, whether its code had some."""
        return int(self._trained.get("dirty", self.made.get("dirty") or 0))

    @property
    def hardware(self) -> str:
        """The accelerators and CPUs that trained its runs; "" where they were not recorded."""
        accelerators = self._trained.get("accelerators", self.made.get("accelerators", []))
        return ", ".join([*accelerators, *self._trained.get("cpu", [])])

    @property
    def date(self) -> str:
        """The day of its answers; "" where that was not recorded."""
        return self.made.get("date", "")

    @property
    def _trained(self) -> TrainedBy:
        return self.made.get("runs", {})


def load_evidence(folder: Path) -> list[Experiment]:
    """Every experiment in `folder`, by name. Raises MuonlabError where there is none, and for one with claims but
    without answers."""
    experiments = [_load(each) for each in kept_in(folder)]
    page = correct_page(pd.concat([e.answers for e in experiments], ignore_index=True))
    return [replace(e, answers=page[page["experiment"] == e.name]) for e in experiments]


@dataclass(frozen=True)
class Page:
    """What a page shows of `experiments`: rows of claims of papers, each from runs of its own, of muonlab's own claims,
    of those about a disagreement, the sentences of its top, and how often each answer was given to papers."""

    experiments: Sequence[Experiment]
    claims: pd.DataFrame
    own: pd.DataFrame
    disputed: pd.DataFrame
    known: pd.DataFrame
    unknown: pd.DataFrame
    totals: dict[str, int]
    asked: int
    runs: int


def make_page(experiments: Sequence[Experiment]) -> Page:
    """Sorts the answers of all experiments."""
    claims = pd.concat([e.answers for e in experiments], ignore_index=True)
    own, settled = claims["own"].astype(bool), claims["answer"].isin(SETTLED)
    new = claims["repeats"] == ""
    counts = claims.loc[~own & new, "answer"].value_counts()
    sentences = (claims["headline"] != "") & new
    asked = [e for e in experiments if len(e.answers)]
    return Page(
        experiments=experiments,
        claims=claims[~own & new],
        own=claims[own],
        disputed=claims[(claims["contradicts"] != "") & new].sort_values("contradicts", kind="stable"),
        known=_known(claims[sentences & settled].sort_values("q", kind="stable")),
        unknown=claims[sentences & ~settled].head(UNKNOWN),
        totals={answer: int(counts.get(answer, 0)) for answer in ANSWERS},
        asked=len(asked),
        runs=sum(e.runs for e in asked),
    )


def _known(claims: pd.DataFrame) -> pd.DataFrame:
    """The first claims; of those that say the same of several models the first, which names where else it holds."""
    parts = claims["headline"].str.extract(ABOUT)
    about = parts["about"].dropna().groupby(parts["sentence"]).agg(lambda each: list(dict.fromkeys(each)))
    first = claims[~parts["sentence"].duplicated()].head(KNOWN)
    sentences = parts.loc[first.index, "sentence"]
    return first.assign(headline=[sentence + _where(about.get(sentence, [])) for sentence in sentences])


def _where(about: Sequence[str]) -> str:
    if not about:
        return ""
    return f" ({about[0]}; also: {'; '.join(about[1:])})" if len(about) > 1 else f" ({about[0]})"


def evidence(experiments: Sequence[Experiment]) -> str:
    """The page in Markdown: what is known, contradictions between papers, then every experiment with its claims. The
    same experiments give the same text."""
    from jinja2 import Environment, FileSystemLoader

    pages = Environment(loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"rows": _rows, "sentence": _sentence, "each": rows_of}
    text = pages.get_template("evidence.md.j2").render(**vars(make_page(experiments)), method=METHOD.strip())
    return text.rstrip() + "\n"


def write_evidence(folder: Path) -> Path:
    """Write `folder`/README.md, whole or not at all, and the first findings between their marks in the README of the
    project beside it; its path."""
    path, front = folder / "README.md", folder.resolve().parent / "README.md"
    experiments = load_evidence(folder)
    _write(path, evidence(experiments))
    if front.exists() and len(parts := MARK.split(front.read_text(encoding="utf-8"))) == 3:
        known = list(rows_of(make_page(experiments).known))[:FRONT]
        lines = [f"{place}. {_sentence(row, f'{folder.name}/')}" for place, row in enumerate(known, start=1)]
        parts[1] = "\n" + "\n".join(lines) + "\n"
        _write(front, "<!-- findings -->".join(parts))
    return path


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.stem}.{os.getpid()}.md")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _load(folder: Path) -> Experiment:
    spec, made = read_mapping(folder / "experiment.yaml"), read_made(folder)
    path = folder / "answers.json"
    if spec.get("claims") and not path.exists():
        raise MuonlabError(f"the results in {folder} are damaged: there are claims, and no {path.name}")
    rows = read_rows(path) if path.exists() else []
    answers = pd.DataFrame(rows).reindex(columns=[*ANSWER_COLUMNS]).astype(object)
    numbers = ["p", "p_holm", "equivalence_p"]
    words = answers.drop(columns=numbers)
    answers = pd.concat([words.where(words.notna(), ""), answers[numbers].astype(float)], axis=1)
    figures = [figure["name"] for figure in spec.get("figures", ())]
    table = folder / "runs.csv"
    runs = len(read_table(table, ["run"])) if table.exists() else 0
    return Experiment(folder.name, spec, made, answers.assign(experiment=folder.name), figures, runs)


def _rows(answers: pd.DataFrame, columns: list[str]) -> str:
    table = answers.copy()
    table["figure"] = [_figure(row) for row in rows_of(table)]
    table["n"] = ["" if n == "" else f"{n:.0f}" for n in table["n"]]
    table["q"] = ["" if math.isnan(q) else f"{q:.2g}" for q in table["q"]]
    table["answer"] = "**" + table["answer"] + "**"
    shown = [name for name in columns if name != "why" or table["why"].any()]
    return as_markdown(table[shown].rename(columns=TITLES))


def _sentence(row: AnswerRow, place: str = "") -> str:
    """A sentence of the top of the page, with its number, interval, n and figure."""
    figure = f", {_figure(row, place)}" if row.figure else ""
    why = f"; {row.why}" if row.why else ""
    return f"{row.headline.rstrip('.')}: {row.effect} (n = {row.n}{figure}){why}."


def _figure(row: AnswerRow, place: str = "") -> str:
    return f"[{row.figure}]({place}{row.experiment}/{row.figure}.png)" if row.figure else ""


def main() -> None:
    """Raises MuonlabError where there is nothing to gather."""
    parser = argument_parser("analysis.evidence", __doc__.partition(": ")[2])
    parser.add_argument("folder", type=Path, help="results/")
    print(write_evidence(parser.parse_args().folder))


if __name__ == "__main__":
    run_command(main)
