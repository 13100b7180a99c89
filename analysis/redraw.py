"""python -m analysis.redraw FOLDER: draw every figure of the experiments kept there from their tables alone."""

from pathlib import Path

from analysis.archive import load_frames
from analysis.compose import draw
from analysis.kept import read_mapping, read_table
from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError


def redraw(folder: Path) -> list[Path]:
    """Draw the figures of one experiment's folder; their PNG files.

    A figure with `table` shows that CSV file of the folder, any other the kept runs. Raises MuonlabError for those that
    cannot be drawn, after all others were.
    """
    spec, made = read_mapping(folder / "experiment.yaml"), read_mapping(folder / "made.json")
    paths, failed = [], []
    for figure in spec.get("figures", ()):
        figure = _with_windows(figure, spec.get("conditions", {}))
        table = figure.pop("table", None)
        try:
            data = read_table(folder / table) if table else load_frames(folder)
            paths.append(draw(figure, data, folder, made_by(made))["png"])
        except MuonlabError as error:
            failed.append(f"{figure['name']}: {error}")
    if failed:
        raise MuonlabError(f"{folder} has figures that cannot be drawn: {'; '.join(failed)}")
    return paths


def _with_windows(figure: dict, conditions: dict) -> dict:
    """The figure's settings; one of the switch takes the windows of its condition."""
    found = [
        conditions[name]["windows"]
        for name in figure.get("conditions", ())
        if "windows" in conditions.get(name, ())
    ]
    return dict(figure) | ({"windows": found[0]} if figure["kind"] == "switch" and found else {})


def made_by(made: dict) -> str:
    """The caption's last sentence: how to repeat it, and with which code its runs were trained."""
    trained = made.get("runs", {"commits": [made.get("commit") or "unknown"], "dirty": made.get("dirty")})
    commits = ", ".join(commit[:9] for commit in trained["commits"])
    changed = "+changes" if trained["dirty"] else ""
    return f"Repeat: {made['command']} (commit {commits}{changed})."


def main() -> None:
    """Raises MuonlabError where there is nothing to draw."""
    parser = argument_parser("analysis.redraw", __doc__.partition(": ")[2])
    parser.add_argument("folder", type=Path, help="results/, or one experiment's folder in it")
    folder = parser.parse_args().folder
    experiments = sorted(path.parent for path in folder.rglob("experiment.yaml"))
    if not experiments:
        raise MuonlabError(f"no experiment is kept in {folder}; make ablation makes the first")
    for experiment in experiments:
        for path in redraw(experiment):
            print(path)


if __name__ == "__main__":
    run_command(main)
