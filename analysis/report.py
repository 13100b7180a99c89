"""python -m analysis.report FOLDER: one HTML page of all figures, answers and the method, that needs no network."""

import base64
import io
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from analysis.drawing.save import CAPTION_SHARE
from analysis.evidence import METHOD, TEMPLATES, Experiment, load_evidence, make_page
from analysis.frames import rows_of
from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError

WIDTHS = (
    2070,
    1400,
    1000,
    700,
)  # pixels of the widest figure: the largest that keeps the page within BYTES is taken
BYTES = 15_000_000


@dataclass(frozen=True)
class Picture:
    """A PNG figure without its caption strip. data: a data URI. width, height: in CSS pixels, of its printed size."""

    data: str
    caption: str
    width: int
    height: int


def report(folder: Path) -> str:
    """The page of the experiments kept in `folder`. The same files give the same text.

    Figures are embedded without their captions, which are set below them as text, and scaled down together where the
    page would pass BYTES. Raises MuonlabError where there is no experiment, or a figure was not drawn.
    """
    experiments = load_evidence(folder)
    paths = {(e.name, name): folder / e.name / f"{name}.png" for e in experiments for name in e.figures}
    if missing := [str(path) for path in paths.values() if not path.exists()]:
        raise MuonlabError(f"{', '.join(missing)} was not drawn; draw all figures first (make figures)")
    for width in WIDTHS:
        pictures = {key: embedded(path, width) for key, path in paths.items()}
        if sum(len(picture.data) for picture in pictures.values()) <= BYTES:
            break
    pages = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {"inline": _inline, "facts": _facts, "each": rows_of}
    return pages.get_template("report.html.j2").render(
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        **vars(make_page(experiments)),
        method=METHOD,
        pictures=pictures,
    )


def embedded(path: Path, width: int) -> Picture:
    """A figure for the page.

    width: of a full-page figure, in pixels at most; narrower ones in proportion. Colours are quantised to 256, without
    visible loss.
    """
    with Image.open(path) as file:
        caption, share = file.info.get("Description", ""), float(file.info.get(CAPTION_SHARE, 0))
        dots = file.info.get("dpi", (300, 300))[0]
        image = file.convert("RGB").crop((0, 0, file.width, round(file.height * (1 - share))))
    printed = (round(image.width / dots * 96), round(image.height / dots * 96))
    scale = min(1, width / WIDTHS[0])
    size = (round(image.width * scale), round(image.height * scale))
    small = image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)
    written = io.BytesIO()
    small.quantize(256, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    data = base64.b64encode(written.getvalue()).decode()
    return Picture(f"data:image/png;base64,{data}", caption, *printed)


def _facts(experiment: Experiment) -> list[tuple[str, str]]:
    """What the page lists of an experiment above its answers, by heading; empty where nothing was said."""
    return [
        *experiment.said.items(),
        ("Seeds", experiment.seeds),
        ("Repeat", f"`{experiment.command}`"),
        ("Runs", f"{experiment.runs:,}" if experiment.runs else ""),
        ("Commit", experiment.commits + (" with uncommitted changes" if experiment.dirty else "")),
        ("Hardware", experiment.hardware),
        ("Date", experiment.date),
        ("Note on tuning", "; ".join(experiment.notes)),
    ]


def _inline(words: str) -> str:
    """HTML of words in which `code` is code, and links into the repository are their text alone."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(words.split()))
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(plain))


def main() -> None:
    """Raises MuonlabError where there is nothing to report."""
    parser = argument_parser("analysis.report", __doc__.partition(": ")[2])
    parser.add_argument("folder", type=Path, help="results/")
    parser.add_argument("--out", type=Path, help="the page's file (default: report.html in the folder)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.folder / "report.html"
    page = report(arguments.folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    print(out)


if __name__ == "__main__":
    run_command(main)
