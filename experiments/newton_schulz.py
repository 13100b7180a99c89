"""python experiments/newton_schulz.py: what each Newton-Schulz schedule does to a singular value, in milliseconds.

Question: to which band do the steps of each published schedule map the singular values of a normalised matrix, and
does any of them turn a direction round? Source: Jordan 2024 (phi^N, accepted band 0.7 to 1.3), and the schedules' own.
Writes the curves, the bands and the figure into results/newton_schulz/.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from analysis.redraw import redraw
from muonlab.optim import describe_schedule
from muonlab.optim.schedules import resolve_schedule
from muonlab.record.environment import code_version

SCHEDULES = ["jordan", "you", "polar_express_1.02", "cans", "cubic", "deepseek"]
BASELINE = [(2.0, -1.5, 0.5)] * 5  # the untuned quintic of Jordan's first figure
FLOORS = (0.1, 0.01, 0.001)
SPEC = {
    "question": " ".join(__doc__.partition("Question: ")[2].partition(" Source:")[0].split()),
    "figures": [
        {
            "name": "polynomials",
            "kind": "polynomials",
            "table": "curves.csv",
            "about": "Composed polynomials, each with its published number of steps.",
        }
    ],
}


def curves() -> pd.DataFrame:
    """panel, schedule, steps, x (singular value over the norm), y (its image): Jordan's tuning, and small values."""
    tables = []
    panels = {"whole": ({"baseline": BASELINE, "jordan": "jordan"}, np.linspace(0, 1, 1001)[1:])}
    panels["small"] = ({name: name for name in SCHEDULES}, np.geomspace(1e-4, 0.1, 700))
    for panel, (schedules, x) in panels.items():
        for name, schedule in schedules.items():
            steps, y = (
                len(describe_schedule(schedule).schedule.rows),
                resolve_schedule(schedule).scalar_map(torch.from_numpy(x)),
            )
            tables.append(pd.DataFrame({"panel": panel, "schedule": name, "steps": steps, "x": x, "y": y}))
    return pd.concat(tables, ignore_index=True)


def bands() -> pd.DataFrame:
    """schedule, steps, whether it keeps its sign on (0, 1], slope at 0, and its band over [floor, 1] for each floor."""
    rows = []
    for name in SCHEDULES:
        reports = {floor: describe_schedule(name, floor=floor) for floor in FLOORS}
        report = reports[FLOORS[0]]
        row = {
            "schedule": name,
            "steps": len(report.schedule.rows),
            "keeps_sign": report.keeps_sign,
            "slope": report.slope,
        }
        for floor, r in reports.items():
            row |= {f"low_{floor:g}": r.band[0], f"high_{floor:g}": r.band[1]}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Write the tables and draw."""
    out = Path("results/newton_schulz")
    out.mkdir(parents=True, exist_ok=True)
    curves().to_csv(out / "curves.csv", index=False, float_format="%.8g")
    table = bands()
    table.to_csv(out / "bands.csv", index=False, float_format="%.6g")
    (out / "experiment.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    commit, dirty = code_version()
    made = {"command": "python experiments/newton_schulz.py", "commit": commit, "dirty": dirty}
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    print(table.to_string(index=False, float_format="{:.4g}".format))
    for path in redraw(out):
        print(path)


if __name__ == "__main__":
    main()
