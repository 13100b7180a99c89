"""python -m muonlab.record FOLDER...: score recorded runs for spikes, old ones by today's definitions."""

from pathlib import Path

import pandas as pd

from muonlab.command import argument_parser, run_command
from muonlab.record.load import Run, load_run

SHOWN = 20
"""Events printed for each run; the rest are counted."""


def main(arguments: list[str] | None = None) -> None:
    """Print a table of the runs, one line each, and below it the spikes of each."""
    parser = argument_parser("muonlab.record", __doc__.partition(": ")[2])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders that hold run folders")
    runs = [load_run(folder) for path in parser.parse_args(arguments).folders for folder in _runs_in(path)]
    print("Spike scores: percentage of steps flagged, by definition and series.")
    print(_table(runs).to_string(index=False, float_format="{:.4g}".format))
    for run in runs:
        if len(run.events):
            print(f"\n{run.folder.name}: {len(run.events)} events")
            print(run.events.head(SHOWN).to_string(index=False, float_format="{:.5g}".format))
            if len(run.events) > SHOWN:
                print(f"... and {len(run.events) - SHOWN} more")


def _runs_in(path: Path) -> list[Path]:
    """`path` if it is a run, else the runs directly below it."""
    below = sorted(config.parent for config in path.glob("[!.]*/config.yaml"))
    return below if below and not (path / "config.yaml").exists() else [path]


def _table(runs: list[Run]) -> pd.DataFrame:
    """One line a run, under a header of two lines: definition, series."""
    rows = [
        {
            ("", "run"): run.folder.name,
            ("", "status"): run.status,
            ("", "steps"): len(run.steps),
            **{tuple(name.split("/")): score for name, score in run.spike_scores.items()},
            ("", "events"): len(run.events),
        }
        for run in runs
    ]
    return pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(rows[0]))


if __name__ == "__main__":
    run_command(main)
