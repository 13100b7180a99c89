"""python -m analysis.changes OLD NEW: write NEW/CHANGES.md, the answers that differ between two folders of results."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from analysis.archive import read_rows
from analysis.tables import as_markdown
from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError

# Earlier words for an answer that the same evidence still gives.
RENAMED = {"opposite": "contradicted"}
# What a change means where the answer itself does not say what keeps it from saying more.
MEANING = {
    "reproduced": "the interval and the corrected p say so; the deviation between seeds is no limit any more",
    "contradicted": "the interval lies outside of what was claimed",
    "equivalent": "the interval lies within the margin",
    "gone": "the experiment asks something else now",
    "dropped": "the experiment is not kept any more",
    "new": "asked for the first time",
}
COLUMNS = ["experiment", "claim", "before", "now", "reason"]


def changes(old: Path, new: Path) -> pd.DataFrame:
    """A row of COLUMNS for each claim whose answer differs, is gone or is new, by experiment and in its order.

    A claim is known by its words and its experiment. Raises MuonlabError where a folder has no answers.
    """
    before, now = _answers(old), _answers(new)
    kept = {experiment for experiment, _ in now}

    def reason(key: tuple[str, str]) -> str:
        if key in now:
            return _reason(now[key], key in before)
        return MEANING["gone" if key[0] in kept else "dropped"]

    rows = [
        (*key, _word(before, key), _word(now, key), reason(key))
        for key in sorted({**before, **now}, key=lambda key: key[0])
        if _differs(before.get(key), now.get(key))
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def write_changes(old: Path, new: Path) -> Path:
    """Write `new`/CHANGES.md; its path."""
    table = changes(old, new)
    count = int((table["before"] == "").sum())
    text = f"{len(table) - count} answers of before differ or are gone, and {count} claims are new."
    path = new / "CHANGES.md"
    path.write_text(f"# What changed\n\n{text}\n\n{as_markdown(table)}\n", encoding="utf-8")
    return path


Answers = Mapping[tuple[str, str], Mapping[str, object]]


def _answers(folder: Path) -> Answers:
    paths = sorted(folder.glob("*/answers.json"))
    if not paths:
        raise MuonlabError(f"no answers are kept in {folder}")
    return {(path.parent.name, str(row["claim"])): row for path in paths for row in read_rows(path)}


def _word(answers: Answers, key: tuple[str, str]) -> str:
    return str(answers[key]["answer"]) if key in answers else ""


def _differs(before: Mapping[str, object] | None, now: Mapping[str, object] | None) -> bool:
    if before is None or now is None:
        return True
    return RENAMED.get(str(before["answer"]), before["answer"]) != now["answer"]


def _reason(now: Mapping[str, object], known: bool) -> str:
    why = str(now.get("why") or MEANING.get(str(now["answer"]), ""))
    return why if known else "; ".join(filter(None, (MEANING["new"], str(now.get("why") or ""))))


def main() -> None:
    """Raises MuonlabError where a folder has no answers."""
    parser = argument_parser("analysis.changes", __doc__.partition(": ")[2])
    parser.add_argument("old", type=Path, help="results/ of before")
    parser.add_argument("new", type=Path, help="results/ of now")
    folders = parser.parse_args()
    print(write_changes(folders.old, folders.new))


if __name__ == "__main__":
    run_command(main)
