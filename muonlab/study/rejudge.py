"""python -m muonlab.study.rejudge FOLDER: answer every claim again from the tables kept in FOLDER, without the runs."""

from pathlib import Path

from muonlab.command import argument_parser, run_command
from muonlab.settings.check import check
from muonlab.study.asking import Given
from muonlab.study.design import Design
from muonlab.study.reading import make_design, read_experiment


def design_of(folder: Path) -> Design:
    """The runs that are kept in `folder`, with the claims and figures that the experiment's file has today.

    Raises MuonlabError where a claim asks for runs that are not kept.
    """
    from analysis.archive import read_mapping

    kept = read_mapping(folder / "experiment.yaml")
    name = folder.name.removesuffix(f"-{kept.get('scale', 'cpu')}")
    given = check(Given, kept.get("asks", {}), "asks")
    for text in (each for each in given.values() if isinstance(each, str)):
        name = name.removesuffix(f"-{text}")
    today = read_experiment(name, given).as_mapping()
    asked = {key: today[key] for key in ("claims", "harmless", "figures") if key in today}
    return make_design(kept | asked, f"experiments/{name}.yaml, on the runs kept in {folder}")


def main() -> None:
    """Raises MuonlabError where nothing is kept."""
    parser = argument_parser("muonlab.study.rejudge", __doc__.partition(": ")[2])
    parser.add_argument("folder", type=Path, help="results/, or one experiment's folder in it")
    folder = parser.parse_args().folder
    from analysis.archive import TESTS, kept_in
    from analysis.evidence import write_evidence
    from muonlab.study.answering import judge_again

    kept = kept_in(folder)
    for each in kept:
        if any((each / name).exists() for name in (TESTS, "answers.json")):
            judge_again(each, design_of(each))
    print(write_evidence(folder if folder not in kept else folder.parent))


if __name__ == "__main__":
    run_command(main)
