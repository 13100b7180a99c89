"""What finished runs say: tables, verdicts, figures and answers in results/NAME."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.archive import choose, save_frames, stack
from analysis.claims import answer
from analysis.frames import Frames, collect
from analysis.judge import judge_harmless, judge_runs, judge_switch, summarise
from analysis.redraw import redraw
from analysis.tables import as_text, save_table, verdict_table
from muonlab.experiment.training import Best, Trained
from muonlab.record import collect_environment, load_run

MADE = ("command", "commit", "dirty", "python", "packages", "platform", "cpu", "cores", "accelerators")


def judge_and_draw(
    name: str, spec: Mapping[str, Any], trained: Trained, tuned: list[Best], out: Path, command: str
) -> None:
    """Write tables, verdicts and figures of the finished runs into `out`, and print the answers."""
    frames = gather(trained)
    parts = []
    for condition, section in spec["conditions"].items():
        chosen = choose(frames, [condition])
        parts.append(judge_runs(chosen).assign(condition=condition))
        if "windows" in section:
            parts.append(judge_switch(chosen, section["windows"]).assign(condition=condition))
    verdicts = pd.concat(parts, ignore_index=True)
    answers = pd.DataFrame([answer(claim, frames, verdicts) for claim in spec.get("claims", ())])
    for pair in spec.get("harmless", ()):
        runs = choose(frames, [pair["condition"]]).runs
        verdict = judge_harmless(runs, pair["arm"], pair["baseline"])
        words = {True: "reproduced", False: "not reproduced", None: "not testable"}
        row = {"claim": f"The clip is harmless at a {pair['condition']} learning rate", "source": "K2 App. D"}
        answers.loc[len(answers)] = row | {
            "n": runs["seed"].nunique(),
            "effect": verdict.sentence,
            "verdict": words[verdict.holds],
        }

    save_frames(frames, out)
    (out / "experiment.yaml").write_text(
        yaml.safe_dump(dict(spec), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    made = provenance(trained, command) | {"date": datetime.now(UTC).date().isoformat()}
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if tuned:
        rows = [vars(best) | {"level": str(best.level)} for best in tuned]
        pd.DataFrame(rows).to_csv(out / "tuned.csv", index=False, float_format="%.6g", lineterminator="\n")
    verdicts.to_csv(out / "verdicts.csv", index=False, float_format="%.6g", lineterminator="\n")
    (out / "verdict.json").write_text(answers.to_json(orient="records", indent=1) + "\n", encoding="utf-8")
    save_table(answers, out, "answers")
    print()
    for condition in spec["conditions"]:
        print(f"{condition}: verdict held in runs / judged runs (median value)")
        print(as_text(verdict_table(summarise(verdicts[verdicts["condition"] == condition]))), end="\n\n")
    for best in tuned:
        print(best)
    for row in answers.itertuples():
        print(f"{row.verdict:<15}{row.claim} [{row.source}]\n{'':15}{row.effect} (n = {row.n})")
    print(f"\n{name} is written:")
    for path in [out / "answers.md", out / "verdicts.csv", *redraw(out)]:
        print(f"  {path}")


def gather(trained: Trained) -> Frames:
    """The frames of all runs, with the columns `condition` and `level` (NaN where nothing varies) in each table."""
    grouped: dict[str, dict[str, list[Path]]] = {}
    for cell, folder in trained:
        grouped.setdefault(cell.condition, {}).setdefault(cell.arm, []).append(folder)
    frames = stack({condition: collect(arms) for condition, arms in grouped.items()})
    keys = ["condition", "arm", "run"]
    named = [(cell.condition, cell.arm, folder.name, cell.level.value) for cell, folder in trained]
    levels = pd.DataFrame(named, columns=[*keys, "level"])
    return Frames(**{name: table.merge(levels, on=keys, how="left") for name, table in vars(frames).items()})


def provenance(trained: Trained, command: str) -> dict[str, Any]:
    """How to repeat it; the commit that judges; and the commits and the hardware that trained the runs."""
    judge = collect_environment() | {"command": command}
    runs = [load_run(folder).environment for _, folder in trained]
    return {key: judge[key] for key in MADE} | {
        "runs": {
            "commits": sorted({run["commit"] or "unknown" for run in runs}),
            "dirty": sum(bool(run["dirty"]) for run in runs),
            "cpu": sorted({run["cpu"] for run in runs}),
            "accelerators": sorted({name for run in runs for name in run["accelerators"]}),
        }
    }
