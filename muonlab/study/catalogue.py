"""python -m muonlab.study.catalogue: write the table of all experiments into experiments/README.md."""

import ast
from pathlib import Path

from muonlab.cli import project_folder
from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError
from muonlab.study.design import Design
from muonlab.study.reading import read_experiment

BEGIN, END = "<!-- catalogue: python -m muonlab.study.catalogue -->", "<!-- end of the catalogue -->"


def experiment_names() -> list[str]:
    """The names of all experiments, quickest first."""
    return list(_experiments())


def _experiments() -> dict[str, Design]:
    names = sorted(path.stem for path in project_folder("experiments").glob("*.yaml"))
    designs = {name: read_experiment(name) for name in names}
    return dict(sorted(designs.items(), key=lambda item: item[1].minutes))


def catalogue() -> str:
    """A Markdown table: name, question, claims, minutes on two cores, other scales; then the scripts."""
    lines = ["| name | question | claims | minutes | scales |", "|---|---|---:|---:|---|"]
    for name, design in _experiments().items():
        scales = ", ".join(dict.fromkeys(["cpu", *design.scales]))
        question = " ".join(design.question.split())
        row = f"| [{name}]({name}.yaml) | {question} | {len(design.all_claims())} | {design.minutes:g} | {scales} |"
        lines.append(row)
    for path in sorted(project_folder("experiments").glob("*.py")):
        asked = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition(
            "Question: "
        )[2]
        question = " ".join(asked.partition("?")[0].split()) + "?"
        lines.append(f"| [{path.stem}]({path.name}) | {question[0].upper()}{question[1:]} | 0 | 1 | cpu |")
    return "\n".join(lines)


def with_catalogue(text: str) -> str:
    """The page with a new table between its two markers. Raises MuonlabError for a page without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MuonlabError(f"the page has no place for the catalogue, between '{BEGIN}' and '{END}'")
    return f"{before}{BEGIN}\n{catalogue()}\n{END}{after}"


def main() -> None:
    """Renew the table in experiments/README.md."""
    argument_parser("muonlab.study.catalogue", __doc__.partition(": ")[2]).parse_args()
    path = Path(project_folder("experiments")) / "README.md"
    path.write_text(with_catalogue(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    run_command(main)
