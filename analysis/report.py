"""python -m analysis.report FOLDER: one HTML page of all figures, answers and the method, that needs no network."""

import base64
import io
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

import pandas as pd
from PIL import Image

from analysis.evidence import METHOD, VERDICTS, Experiment, load_evidence
from analysis.frames import rows_of
from analysis.save import CAPTION_SHARE
from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError

STYLE = Path(__file__).with_name("report.css")
WIDTHS = (2070, 1400, 1000, 700)  # pixels of the widest figure: the most that stay within BYTES
BYTES = 15_000_000  # of the page


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
        figures = {key: embedded(path, width) for key, path in paths.items()}
        if sum(len(data) for data, *_ in figures.values()) <= BYTES:
            break
    claims = pd.concat([e.answers for e in experiments], ignore_index=True)
    disputed = claims[claims["contradicts"] != ""].sort_values("contradicts", kind="stable")
    parts = [_head(experiments, claims, len(disputed))]
    parts += _disputed(disputed) if len(disputed) else []
    parts += _answers(claims)
    parts += [f'<h2 id="method">Method</h2>\n<p>{_inline(METHOD)}</p>']
    for experiment in experiments:
        parts.append(_experiment(experiment, figures))
    parts.append("<footer>Written by <code>python -m analysis.report</code> from the tables and figures kept in "
                 "<code>results/</code>; the same files give the same page.</footer>")  # fmt: skip
    return _page("muonlab: the evidence", "\n".join(parts))


def embedded(path: Path, width: int) -> tuple[str, str, tuple[int, int]]:
    """A PNG figure as a data URI without its caption strip, its caption, and its printed size in CSS pixels.

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
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}", caption, printed


def _head(experiments: list[Experiment], claims: pd.DataFrame, disputed: int) -> str:
    counts = claims["verdict"].value_counts()
    totals = "".join(f"<li><b>{counts.get(verdict, 0)}</b>{_verdict(verdict)}</li>" for verdict in VERDICTS)
    runs = sum(e.runs for e in experiments)
    contents = [("disputed", "Where papers disagree")] if disputed else []
    contents += [("answers", "All answers"), ("method", "Method")]
    contents += [*((f"e-{e.name}", e.name.replace("_", " ")) for e in experiments)]
    links = "".join(f'<li><a href="#{anchor}">{escape(title)}</a></li>' for anchor, title in contents)
    asked = sum(bool(len(e.answers)) for e in experiments)
    return (
        "<h1>What optimizers do to a transformer's training: the evidence</h1>\n"
        f'<p class="lead">{len(claims)} claims about AdamW, Muon and MuonClip, judged by code in {asked} '
        f"experiments with {runs:,} runs of small models.</p>\n"
        f'<ul class="totals">{totals}</ul>\n<nav aria-label="contents"><ul>{links}</ul></nav>'
    )


def _answers(claims: pd.DataFrame) -> list[str]:
    rows = []
    for claim in rows_of(claims):
        told = f'{escape(claim.claim)}<br><span class="source">{escape(str(claim.source))}</span>'
        at = f'<a href="#e-{claim.experiment}">{escape(claim.experiment.replace("_", " "))}</a>'
        shown = _link(claim.experiment, claim.figure) if claim.figure else ""
        rows.append([told, ("n", claim.n), ("effect", claim.effect), ("verdict", claim.verdict), at, shown])
    return [
        '<h2 id="answers">All answers</h2>',
        _table(["claim", "n", "effect [95%]", "verdict", "experiment", "figure"], rows),
    ]


def _disputed(claims: pd.DataFrame) -> list[str]:
    rows = [
        [
            f"<b>{escape(claim.contradicts)}</b><br>{escape(claim.claim)}",
            ("effect", claim.effect),
            ("verdict", claim.verdict),
            escape(claim.side) or "undecided",
            _link(claim.experiment, claim.figure) if claim.figure else "",
        ]
        for claim in rows_of(claims)
    ]
    head = ["question and claim", "effect [95%]", "verdict", "this evidence is on the side of", "figure"]
    return ['<h2 id="disputed">Where papers disagree</h2>', _table(head, rows)]


def _experiment(experiment: Experiment, figures: dict) -> str:
    name, answers, made = experiment.name, experiment.answers, experiment.made
    parts = [
        f'<h2 id="e-{name}">{escape(name.replace("_", " "))}</h2>',
        f"<p>{escape(experiment.question)}</p>",
    ]
    facts = dict(experiment.said)
    if "seeds" in experiment.spec:
        facts["Seeds"] = ", ".join(str(seed) for seed in experiment.spec["seeds"])
    trained = made.get("runs", {})
    commits = ", ".join(c[:9] for c in trained.get("commits", [made.get("commit") or "unknown"]))
    facts["Repeat"] = f"`{made['command']}`"
    facts["Runs"] = f"{experiment.runs:,}" if experiment.runs else ""
    facts["Commit"] = commits + (
        " with uncommitted changes" if trained.get("dirty", made.get("dirty")) else ""
    )
    hardware = [*trained.get("accelerators", made.get("accelerators", ())), *trained.get("cpu", ())]
    facts["Hardware"] = ", ".join(hardware)
    facts["Date"] = made.get("date", "")
    notes = dict.fromkeys(note for row in answers["note"] for note in str(row).split("; ") if note)
    facts["Note on tuning"] = "; ".join(notes)
    parts.append(_facts({title: words for title, words in facts.items() if words}))
    if len(answers):
        rows = [
            [
                f'{escape(row.claim)}<br><span class="source">{escape(str(row.source))}</span>',
                ("n", row.n),
                ("effect", row.effect),
                ("verdict", row.verdict),
            ]
            for row in rows_of(answers)
        ]
        parts.append(_table(["claim", "n", "effect [95%]", "verdict"], rows))
    for figure in experiment.figures:
        data, caption, (width, height) = figures[name, figure]
        parts.append(
            f'<figure id="f-{name}-{figure}"><img src="{data}" width="{width}" height="{height}" '
            f'alt="{escape(caption)}">'
            f"<figcaption><b>{escape(figure)}.</b> {escape(caption)}</figcaption></figure>"
        )
    return "\n".join(parts)


def _facts(facts: dict[str, str]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{title}</dt><dd>{_inline(words)}</dd>" for title, words in facts.items())
        + "</dl>"
    )


def _table(head: Iterable[str], rows: Iterable[list]) -> str:
    """Cells are HTML, or (class, plain text)."""

    def cell(content: str | tuple[str, object]) -> str:
        if isinstance(content, str):
            return f"<td>{content}</td>"
        kind, text = content[0], str(content[1])
        inside = _verdict(text) if kind == "verdict" else escape(text)
        return f'<td class="{kind}">{inside}</td>'

    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _verdict(verdict: str) -> str:
    return f'<span class="v {verdict.replace(" ", "-")}">{escape(verdict)}</span>'


def _link(experiment: str, figure: str) -> str:
    return f'<a href="#f-{escape(experiment)}-{escape(figure)}">{escape(figure)}</a>'


def _inline(words: str) -> str:
    """Escaped words in which `code` is code, and links into the repository are their text alone."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(words.split()))
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(plain))


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


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
