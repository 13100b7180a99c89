"""The tables that a sweep and an ablation end with, as aligned text, Markdown and CSV."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from analysis.comparison import Paired, compare_arms
from analysis.drawing.palette import styles
from analysis.frames import rows_of
from analysis.inference import holm, t_interval
from analysis.run_tests import RUN_TESTS
from muonlab.errors import MuonlabError


def comparison_table(
    runs: pd.DataFrame, baseline: str, trials: Mapping[str, int] | None = None
) -> pd.DataFrame:
    """One row per arm, in the order of `runs`, best settings over fresh seeds: what a sweep ends with.

    runs: `Frames.runs`, one setting per arm. baseline: the arm that differences are taken to, over shared seeds; by
    `Paired.word`, with p corrected over the rows, each is lower, higher, equal or unresolved. trials: search trials
    spent by arm. Columns: optimizer, validation loss (nats per token, with 95 % t interval), against the baseline, p
    (Holm), seeds, diverged, tokens, seconds, max logit (median over seeds of a run's largest), spike score, setting,
    trials. Diverged seeds count with the loss at initialisation. Raises MuonlabError for an unknown baseline.
    """
    arms = list(dict.fromkeys(runs["arm"]))
    if baseline not in arms:
        raise MuonlabError(f"the baseline '{baseline}' has no run; arms: {', '.join(arms)}")
    others = {arm: _compared(runs, arm, baseline) for arm in arms if arm != baseline}
    adjusted = dict(zip(others, holm([c.p if c else math.nan for c in others.values()]), strict=True))
    against, rows = f"against {styles([baseline])[baseline].label}", []
    for arm, style in styles(arms).items():
        own = runs[runs["arm"] == arm]
        losses = own["loss"].dropna()
        row = {
            "optimizer": style.label,
            "validation loss": str(t_interval(losses)) if len(losses) else "none finished",
            against: _against(others[arm], adjusted[arm]) if arm != baseline else "",
            "p (Holm)": _short(adjusted.get(arm, math.nan)),
            "seeds": len(own),
            "diverged": int((own["status"] == "diverged").sum()),
            "tokens": f"{own['tokens'].median():,.0f}",
            "seconds": f"{own['seconds'].median():,.0f}",
            "max logit": f"{own['max_logit'].median():,.0f}",
            "spike score": _short(own["spike_score"].median()),
            "setting": _setting(own.iloc[0]),
        }
        rows.append(row | ({"trials": trials[arm]} if trials else {}))
    return pd.DataFrame(rows)


def outcome_table(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per arm, level and learning rate, one column per test ("3/3 (134)": holds in 3 of 3 judged runs, median
    value).

    summary: of `run_tests.summarise`. A dash: judged in no run.
    """
    labels = styles(summary["arm"])
    names = sorted(set(summary["name"]), key=list(RUN_TESTS).index)
    rows = []
    varied = summary["level"].notna().any()
    for _, group in summary.groupby(["arm", "level", "lr"], sort=False, dropna=False):
        arm, level, lr = group[["arm", "level", "lr"]].iloc[0]
        cells = {row.name: _cell(row.positive, row.judged, row.value) for row in rows_of(group)}
        rows.append(
            {"arm": labels[arm].label, **({"level": _level(level)} if varied else {}), "lr": f"{lr:g}"}
            | {name: cells.get(name, "-") for name in names}
        )
    return pd.DataFrame(rows)


def _level(value: float | str) -> str:
    return value if isinstance(value, str) else "" if math.isnan(value) else f"{value:g}"


def as_text(table: pd.DataFrame) -> str:
    """The table in aligned columns for a terminal: numbers to the right, words to the left."""
    cells = _cells(table)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = _numeric_columns(table)

    def line(row: list[str]) -> str:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    head, *body = map(line, cells)
    return "\n".join([head, "-" * max(map(len, (head, *body))), *body])


def as_markdown(table: pd.DataFrame) -> str:
    """The table in GitHub's Markdown: numbers to the right, words to the left."""
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in _cells(table))
    rule = ["---:" if to_right else "---" for to_right in _numeric_columns(table)]
    rows = [f"| {' | '.join(row)} |" for row in (head, *body)]
    return "\n".join([rows[0], f"|{'|'.join(rule)}|", *rows[1:]])


def save_table(table: pd.DataFrame, folder: str | Path, name: str) -> dict[str, Path]:
    """Write `name`.txt, `name`.md and `name`.csv into `folder`; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "txt": as_text(table) + "\n",
        "md": as_markdown(table) + "\n",
        "csv": table.to_csv(index=False, lineterminator="\n"),
    }
    paths = {kind: folder / f"{name}.{kind}" for kind in texts}
    for kind, text in texts.items():
        paths[kind].write_text(text, encoding="utf-8")
    return paths


def _compared(runs: pd.DataFrame, arm: str, baseline: str) -> Paired | None:
    ended = runs[runs["loss"].notna()]
    seeds = [set(ended.loc[ended["arm"] == name, "seed"]) for name in (arm, baseline)]
    return compare_arms(runs, arm, baseline) if seeds[0] & seeds[1] else None


def _against(paired: Paired | None, p: float) -> str:
    if paired is None:
        return "no shared seed"
    d = paired.difference
    if d.n < 2:
        return f"{d.estimate:+.3f} (n=1)"
    return f"{d.estimate:+.3f} [{d.low:+.3f}, {d.high:+.3f}] {paired.word(p)}"


def _setting(run: pd.Series) -> str:
    parts = [f"lr={run['lr']:.3g}", f"wd={run['weight_decay']:.3g}", f"tau={run['tau']:g}"]
    return " ".join(part for part in parts if not part.endswith("nan"))


def _cells(table: pd.DataFrame) -> list[list[str]]:
    """The texts of the table, its head first."""
    return [[str(cell) for cell in row] for row in (table.columns, *table.to_numpy())]


def _numeric_columns(table: pd.DataFrame) -> list[bool]:
    """Which columns hold nothing but numbers, empty cells and dashes."""
    columns = zip(*_cells(table)[1:], strict=True)
    filled = [[cell for cell in column if cell not in ("", "-")] for column in columns]
    return [bool(cells) and all(map(_is_number, cells)) for cells in filled] or [False] * table.shape[1]


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", ""))
    except ValueError:
        return False
    return True


def _cell(positive: int, judged: int, value: float) -> str:
    return f"{positive}/{judged} ({value:.3g})" if judged else "-"


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}"
