"""Every committed figure, drawn again from the tables beside it: the same bytes. 25 seconds on one core.

A change of bytes is to be seen and explained: look at the picture, commit it (`make figures`), say why it changed.
"""

import platform
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.redraw import redraw

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in ROOT.glob("results/*/experiment.yaml"))
LOCKED = re.search(r"^matplotlib==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE).group(1)

# Bytes are those of one rasterizer and its fonts; the CPU's vector instructions must not matter.
pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine(), version("matplotlib")) != ("linux", "x86_64", LOCKED),
    reason=f"the committed figures are those of matplotlib {LOCKED} on Linux, x86-64",
)


def change(drawn: Path, committed: Path) -> str:
    """What differs between two files of a figure, in words; "" for the same bytes."""
    if drawn.read_bytes() == committed.read_bytes():
        return ""
    if drawn.suffix != ".png":
        return f"{drawn.name} differs"
    images = [np.asarray(Image.open(path).convert("RGB"), int) for path in (drawn, committed)]
    if images[0].shape != images[1].shape:
        return f"{drawn.name} has another size"
    levels = np.abs(images[0] - images[1]).max(axis=2)
    return f"{drawn.name} differs in {(levels > 0).sum()} pixels by up to {levels.max()} of 255 levels"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_committed_figure_is_drawn_again_with_the_same_bytes(folder, tmp_path):
    figures = {path.stem for path in folder.glob("*.png")}
    written = [f"{name}{kind}" for name in figures for kind in (".png", ".pdf", ".csv")]
    shutil.copytree(folder, tmp_path, ignore=shutil.ignore_patterns(*written), dirs_exist_ok=True)
    assert {path.stem for path in redraw(tmp_path)} == figures
    assert not [said for name in written if (said := change(tmp_path / name, folder / name))]


def test_the_comparison_sees_a_changed_pixel(tmp_path):
    committed = next(FOLDERS[0].glob("*.png"))
    image = Image.open(committed)
    image.putpixel((0, 0), (254, 254, 254, 255))
    image.save(tmp_path / "changed.png")
    said = change(tmp_path / "changed.png", committed)
    assert said == "changed.png differs in 1 pixels by up to 1 of 255 levels"
