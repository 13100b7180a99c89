"""A figure on disk: PDF, PNG and the table that it shows, the same bytes every time."""

import io
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin

CAPTION_SIZE = 5.8  # points
CAPTION_SPACING = 1.3  # line heights
CAPTION_MARGIN = 0.06  # inches left, right, above and below
CAPTION_SHARE = "CaptionShare"  # a text chunk of the PNG
COLORS = 256  # of a PNG: a third of the bytes of true colours, without visible loss


def save_figure(
    fig: Figure, folder: str | Path, name: str, frame: pd.DataFrame, *, caption: str
) -> dict[str, Path]:
    """Write `name`.pdf, `name`.png (300 dpi, 256 colours) and `name`.csv (the plotted table) into `folder`; returns
    their paths.

    The caption is wrapped and set below the axes in small type, in a strip by which the figure grows, so that
    the axes keep their size; it is also the PDF's subject and the PNG's description. The PNG's text
    CAPTION_SHARE is the strip's share of its height. Saving the same figure with the same versions of matplotlib and
    its fonts gives the same bytes: it holds neither dates nor program versions.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{name}.{kind}" for kind in ("pdf", "png", "csv")}
    share = _set_caption(fig, caption)
    flat = " ".join(caption.split())
    pdf_metadata = {
        "Title": name,
        "Subject": flat,
        "Creator": "muonlab",
        "Producer": None,
        "CreationDate": None,
    }
    fig.savefig(paths["pdf"], metadata=pdf_metadata)
    _save_png(fig, paths["png"], {"Title": name, "Description": flat, CAPTION_SHARE: f"{share:.6f}"})
    frame.to_csv(paths["csv"], index=False, float_format="%.7g", lineterminator="\n")
    return paths


def _save_png(fig: Figure, path: Path, texts: dict[str, str]) -> None:
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png")
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    with Image.open(drawn) as image:
        dpi = image.info["dpi"]
        small = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    small.save(path, "PNG", optimize=True, dpi=dpi, pnginfo=chunks)


def _set_caption(fig: Figure, caption: str) -> float:
    """Add the strip; its share of the figure's height."""
    width, height = fig.get_size_inches()
    lines = _wrap(fig, caption, (width - 2 * CAPTION_MARGIN) * fig.dpi)
    strip = len(lines) * CAPTION_SIZE * CAPTION_SPACING / 72 + 2 * CAPTION_MARGIN
    total = height + strip
    fig.set_size_inches(width, total)
    fig.set_layout_engine("constrained", rect=(0, strip / total, 1, height / total))
    fig.text(
        CAPTION_MARGIN / width,
        (strip - CAPTION_MARGIN) / total,
        "\n".join(lines),
        fontsize=CAPTION_SIZE,
        linespacing=CAPTION_SPACING,
        color="#4d4d4d",
        va="top",
        ha="left",
        gid="caption",
        in_layout=False,
    )
    return strip / total


def _wrap(fig: Figure, caption: str, width: float) -> list[str]:
    """Break each paragraph into lines of at most `width` pixels, measured in the caption's own font."""
    ruler = fig.text(0, 0, "", fontsize=CAPTION_SIZE)

    def fits(line: str) -> bool:
        ruler.set_text(line)
        return ruler.get_window_extent().width <= width

    lines = []
    for paragraph in caption.strip().splitlines():
        line = ""
        for word in paragraph.split():
            if line and not fits(f"{line} {word}"):
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        lines.append(line)
    ruler.remove()
    return lines
