"""Saved figures: the same bytes twice, a caption below the axes, the table beside them."""

import hashlib
import re

import matplotlib
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis.drawing.canvas import COLUMN, new_figure, style
from analysis.drawing.panels import plot_loss
from analysis.drawing.save import save_figure
from analysis.figures.spike_vs_stable import plot_spike_vs_stable

CAPTION = "Made-up runs of two seeds; " * 6 + "\npython -m muonlab.experiment ablation (commit 0123456)"


def save(frames, folder):
    with style():
        fig, axes = new_figure(3, 1, height=4.4)
        plot_spike_vs_stable(axes[:, 0], frames.steps, tau=30.0, window=10)
        return save_figure(fig, folder, "spikes", frames.steps, caption=CAPTION)


def digests(paths):
    return {kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in paths.items()}


def test_the_same_bytes_twice_whatever_the_users_settings(frames, tmp_path):
    first = digests(save(frames, tmp_path / "a"))
    assert set(first) == {"pdf", "png", "csv"}
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 20, "figure.dpi": 50, "savefig.dpi": 40}):
        assert digests(save(frames, tmp_path / "b")) == first


def test_nothing_in_the_files_says_when_or_with_what(frames, tmp_path):
    paths = save(frames, tmp_path)
    pdf = paths["pdf"].read_bytes()
    assert b"CreationDate" not in pdf
    assert b"Producer" not in pdf
    assert b"Matplotlib" not in pdf + paths["png"].read_bytes()
    # TrueType, so that the text stays text.
    assert b"/Type /Type3" not in pdf.replace(b"\n", b" ")
    assert re.search(rb"/Subtype /(TrueType|CIDFontType2)", pdf)


def test_the_table_is_kept_with_infinities_and_gaps(tmp_path):
    fig, axes = new_figure()
    axes[0, 0].plot([0, 1])
    frame = pd.DataFrame({"run": ["a", "b"], "loss": [1.23456789, float("inf")], "val_loss": [None, 2.0]})
    paths = save_figure(fig, tmp_path / "deep" / "er", "f", frame, caption="c")
    assert paths["csv"].read_text() == "run,loss,val_loss\na,1.234568,\nb,inf,2\n"


@pytest.mark.parametrize("words", [4, 60])
def test_the_caption_lies_below_the_axes_inside_the_figure(frames, tmp_path, words):
    fig, axes = new_figure(height=2.3)
    plot_loss(axes[0, 0], frames.steps)
    fig.canvas.draw()
    tall = axes[0, 0].get_window_extent().height
    save_figure(fig, tmp_path, "f", frames.steps, caption="seeds " * words)
    assert fig.get_size_inches()[0] == COLUMN
    FigureCanvasAgg(fig).draw()
    (caption,) = [text for text in fig.texts if text.get_gid() == "caption"]
    box, frame = caption.get_window_extent(), fig.bbox
    assert box.x0 >= 0
    assert box.x1 <= frame.x1
    assert box.y0 >= 0
    label = axes[0, 0].xaxis.label.get_window_extent()
    assert box.y1 < label.y0
    # The strip is added below: the axes keep their size.
    assert axes[0, 0].get_window_extent().height == pytest.approx(tall, rel=0.02)
    assert caption.get_text().split() == ["seeds"] * words
