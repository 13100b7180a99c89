"""python -m analysis.redraw FOLDER: draw every figure of the experiments kept there from the tables beside them."""

from pathlib import Path

from analysis.archive import Made, kept_in, load_frames, read_made, read_mapping, read_table
from analysis.figures import draw, read_figure
from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError


def redraw(folder: Path) -> list[Path]:
    """Draw the figures of one experiment's folder; their PNG files.

    A figure with `table` shows that CSV file of the folder, any other the stored runs. Raises MuonlabError for those
    that cannot be drawn, after all others were.
    """
    spec, made = read_mapping(folder / "experiment.yaml"), read_made(folder)
    conditions = spec.get("conditions", {})
    windows = {name: each["windows"] for name, each in conditions.items() if "windows" in each}
    paths, failures = [], []
    for values in spec.get("figures", ()):
        try:
            figure = read_figure(values, windows)
            data = read_table(folder / figure.table) if figure.table else load_frames(folder)
            paths.append(draw(figure, data, folder, made_by(made))["png"])
        except MuonlabError as error:
            failures.append(f"{values.get('name', 'a figure without name')}: {error}")
    if failures:
        raise MuonlabError(f"{folder} has figures that cannot be drawn: {'; '.join(failures)}")
    return paths


def made_by(made: Made) -> str:
    """The caption's last sentence: the command that repeats the runs, and the commits that trained them."""
    trained = made.get("runs", {})
    commits = ", ".join(c[:9] for c in trained.get("commits", [made.get("commit") or "unknown"]))
    changed = "+changes" if trained.get("dirty", made.get("dirty")) else ""
    return f"Repeat: {made['command']} (commit {commits}{changed})."


def main() -> None:
    """Raises MuonlabError where there is nothing to draw."""
    parser = argument_parser("analysis.redraw", __doc__.partition(": ")[2])
    parser.add_argument("folder", type=Path, help="results/, or one experiment's folder in it")
    folder = parser.parse_args().folder
    for experiment in kept_in(folder):
        for path in redraw(experiment):
            print(path)


if __name__ == "__main__":
    run_command(main)
