"""Every kind of figure, drawn as an experiment's file asks for it: what is on it, and the same bytes twice."""

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis.drawing import canvas
from analysis.drawing.palette import ARMS
from analysis.drawing.save import save_figure
from analysis.figures import FIGURES, draw, read_figure, registry
from analysis.figures.registry import describe_sample
from muonlab.errors import MuonlabError

SEEDS = (1, 2, 3)
STEPS, PROBE = "optimizer step (512 tokens each)", "probe-batch loss\n(nats per token)"
LOGIT, VAL, RATE = "max logit (scaled q·k)", "validation loss\n(nats per token)", "peak learning rate"
MADE = "Repeat: make it (commit 012345678)."
SPECTRA = {"svd_entropy/query": 0.9, "svd_entropy/key": 0.8, "svd_entropy/value": 0.7}
EXPERTS = {
    "balance/violation/layer_01": 0.5,
    "balance/violation/layer_02": 1.5,
    "router/entropy/layer_01": 1.2,
}


def arms(names, **more):
    return [
        {"arm": arm, "seed": seed, "loss": 2 + 0.1 * i} | more
        for i, arm in enumerate(names)
        for seed in SEEDS
    ]


def sweep(arm, levels, condition="main", **more):
    return [
        {
            "arm": arm,
            "level": level,
            "seed": seed,
            "condition": condition,
            "loss": 2 + 0.1 * (i - 1) ** 2 + seed / 1e3,
        }
        | more
        for i, level in enumerate(levels)
        for seed in SEEDS
    ]


def growing():
    """The parts of a logit that grows tenfold by each norm and shrinks to half by the cosine."""
    share = np.arange(60) / 59
    norms = dict.fromkeys(("argmax_query_norm", "argmax_key_norm"), 10**share)
    return norms | {"argmax_cosine": 0.5**share, "probe_max_logit": 100**share * 0.5**share}


# kind: settings, runs, the panels' labels (horizontal, vertical), and the texts of the legend.
CASES = {
    "traces": (
        {"tau": 30},
        arms(["adamw", "muon"]),
        [(STEPS, PROBE), (STEPS, LOGIT)],
        ["AdamW (n=3)", "Muon (n=3)"],
    ),
    "spike_vs_stable": (
        {"tau": 30},
        arms(["muon", "muonclip"]),
        [("", "training loss\n(nats per token)"), ("", LOGIT), (STEPS, "gradient norm")],
        ["Muon (n=3)", "MuonClip (n=3)"],
    ),
    "switch": (
        {"windows": [[0, 20], [40, 60]]},
        arms(["muonclip"]),
        [("", PROBE), (STEPS, LOGIT)],
        ["MuonClip (n=3)"],
    ),
    "crossing": (
        {"x": "weight decay"},
        sweep("muon", [0.0, 0.1]),
        [("", PROBE), (STEPS, "minus the baseline's\n(nats)")],
        ["Muon, weight decay 0 (n=3)", "Muon, weight decay 0.1 (n=3)"],
    ),
    "rise_and_fall": (
        {"tau": 30},
        arms(["muon", "muonclip"]),
        [(STEPS, PROBE), (STEPS, LOGIT), (STEPS, "gradient norm"), (STEPS, "share of steps that clip")],
        ["Muon (n=3)", "MuonClip (n=3)"],
    ),
    "spectra": (
        {},
        arms(["adamw", "muon"], steps=SPECTRA),
        [(STEPS, "SVD entropy of the weights"), (STEPS, ""), (STEPS, "")],
        ["AdamW (n=3)", "Muon (n=3)"],
    ),
    "balance": (
        {},
        arms(["muon", "muonclip"], steps=EXPERTS),
        [(STEPS, "load violation\n(max / mean - 1)"), (STEPS, "router entropy (nats)")],
        ["Muon (n=3)", "MuonClip (n=3)"],
    ),
    "mechanism": (
        {},
        arms(["adamw", "muon"], steps=growing()),
        [(STEPS, "growth since warm-up\n(decades)"), (STEPS, "")],
        ["query norm", "key norm", "cosine", "max logit"],
    ),
    "heads": (
        {"tau": 30},
        arms(["muon", "muonclip"]),
        [("optimizer step", LOGIT), ("optimizer step", "")],
        None,
    ),
    "levels": (
        {"metrics": ["loss", "end_max_logit"], "x": "tau"},
        [*sweep("muonclip", [3.0, 10.0, 30.0]), *arms(["muon"])],
        [("τ", VAL), ("τ", "max logit at the end")],
        ["Muon", "MuonClip"],
    ),
    "lr_sensitivity": (
        {},
        [
            run | {"lr": run["level"], "condition": size}
            for size in ("d16", "d32")
            for arm in ("adamw", "muon")
            for run in sweep(arm, [0.001, 0.01, 0.1])
        ],
        [(RATE, VAL), (RATE, ""), ("size", "learning-rate sensitivity (nats)")],
        ["AdamW", "Muon"],
    ),
    "scaling": (
        {},
        [
            {
                "arm": arm,
                "level": size,
                "seed": seed,
                "loss": loss * size**-0.2 + seed / 1e3,
                "flops": 1e9 * size**2,
            }
            for arm, loss in (("adamw", 6.0), ("muon", 5.7))
            for size in (16.0, 24.0, 32.0)
            for seed in SEEDS
        ],
        [("training compute (FLOPs)", VAL)],
        None,
    ),
    "extrapolation": (
        {},
        [
            {"arm": arm, "level": size, "seed": seed, "logit": factor * size * (1 + seed / 50)}
            for arm, factor in (("adamw", 4), ("muon", 6))
            for size in (16.0, 32.0, 48.0, 64.0)
            for seed in SEEDS
        ],
        [("width", "max logit at the end")],
        ["AdamW: measured 1.00 x predicted", "Muon: measured 1.00 x predicted"],
    ),
    "arms": (
        {"tau": 30},
        [
            run | {"condition": c}
            for c in ("common", "best")
            for run in arms(["muon", "muonclip", "muon-qknorm", "adamw"])
        ],
        [("loss minus Muon's (nats)", ""), ("max logit at the end", "")] * 2,
        None,
    ),
    "to_target": (
        {"target": 2.5},
        arms(["adamw", "muon"]),
        [("spent until the target, over AdamW's", "")],
        ["Muon"],
    ),
    "spike_events": (
        {"scores": ["olmo2/grad_norm"]},
        [run | {"condition": c} for c in ("base", "deeper") for run in arms(["adamw", "muon"])],
        [("", ""), ("", "")],
        None,
    ),
}


def polynomials():
    curve = {"steps": 5, "x": [0.01, 0.1, 1.0], "y": [0.5, 1.0, 1.1]}
    return pd.concat(
        [
            pd.DataFrame({"panel": p, "schedule": s} | curve)
            for p, s in (("whole", "jordan"), ("small", "you"))
        ]
    )


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def assert_legible(fig):
    """No text on another, on the legend or outside the figure, and no horizontal tick's text on its neighbour's."""
    FigureCanvasAgg(fig).draw()
    for ax in fig.axes:
        texts = [text for text in (*ax.texts, ax.xaxis.label, ax.yaxis.label) if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        boxes += [text.get_window_extent() for legend in fig.legends for text in legend.get_texts()]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])
            assert min(box.x0, box.y0) >= 0
            assert box.x1 <= fig.bbox.x1 + 1
            assert box.y1 <= fig.bbox.y1 + 1
        low, high = sorted(ax.get_xlim())
        ticks = [t for t in ax.get_xticklabels() if t.get_text() and low <= t.get_position()[0] <= high]
        spans = [t.get_window_extent() for t in ticks if t.get_visible() and not t.get_rotation()]
        assert not any(left.overlaps(right) for left, right in pairwise(spans)), [t.get_text() for t in ticks]


@pytest.fixture
def drawn(monkeypatch):
    """draw(...) that also returns its figure. For speed at few dots an inch and without PDF, whose bytes test_save and
    test_archive compare."""
    monkeypatch.setitem(canvas._SETTINGS, "savefig.dpi", 60)
    savefig = Figure.savefig
    without = lambda fig, path, **more: savefig(fig, path, **more) if more.get("format") == "png" else None  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", without)

    def both(spec, data, folder):
        kept = []
        monkeypatch.setattr(
            registry, "save_figure", lambda fig, *a, **k: kept.append(fig) or save_figure(fig, *a, **k)
        )
        paths = draw(read_figure(spec), data, folder, MADE)
        return kept[0], paths

    return both


def test_a_kind_is_one_file_of_its_name():
    files = {path.stem for path in Path(registry.__file__).parent.glob("*.py")}
    assert files - {"__init__", "registry"} == set(FIGURES)
    for kind, function in FIGURES.items():
        assert function.__module__ == f"analysis.figures.{kind}"
        assert function.__doc__


def test_every_kind_has_a_case():
    assert set(CASES) | {"polynomials"} == set(FIGURES)


@pytest.mark.parametrize("kind", CASES)
def test_a_kind_shows_its_series_and_is_the_same_bytes_twice(kind, make_frames, drawn, tmp_path):
    settings, cells, labels, legend = CASES[kind]
    frames = make_frames(cells)
    spec = {"name": "figure", "kind": kind, "about": "Made-up runs."} | settings
    fig, paths = drawn(spec, frames, tmp_path / "a")
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in fig.axes] == labels
    for ax in fig.axes:
        assert ax.lines or ax.collections, "no panel is empty"
    assert_legible(fig)
    if legend is not None:
        assert sorted(text.get_text() for text in fig.legends[0].get_texts()) == sorted(legend)
    caption = next(text for text in fig.texts if text.get_gid() == "caption").get_text()
    assert f"{len(frames.runs)} runs, n=3 seeds each" in " ".join(caption.split())
    assert " ".join(caption.split()).startswith("Made-up runs.")
    assert " ".join(caption.split()).endswith(MADE)
    assert len(pd.read_csv(paths["csv"]))
    drawn(spec, frames, tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize(
    "kind", ["arms", "extrapolation", "levels", "lr_sensitivity", "scaling", "to_target"]
)
def test_a_kind_draws_arms_whose_markers_are_letters(kind, make_frames, drawn, tmp_path):
    settings, cells, *_ = CASES[kind]
    names = {"muon": "muonh", "adamw": "lion", "muonclip": "muown", "muon-qknorm": "scion"}
    assert {ARMS[name].marker[0] for name in names.values()} == {"$"}
    compared = {"arms": {"baseline": "muonh"}, "to_target": {"baseline": "lion"}}
    compared |= {"scaling": {"arm": "muonh", "baseline": "lion"}}
    frames = make_frames([cell | {"arm": names[cell["arm"]]} for cell in cells])
    fig, _ = drawn({"name": "figure", "kind": kind} | settings | compared.get(kind, {}), frames, tmp_path)
    letters = [line for ax in fig.axes for line in ax.lines if str(line.get_marker()).startswith("$")]
    assert letters
    assert all(line.get_markeredgecolor() == line.get_color() for line in letters)
    assert_legible(fig)


def test_the_figure_of_arms_shows_some_of_several_levels(make_frames, drawn, tmp_path):
    frames = make_frames([*sweep("muon", [1.0, 2.0, 8.0]), *sweep("muonclip", [1.0, 2.0, 8.0])])
    fig, _ = drawn({"name": "figure", "kind": "arms", "levels": [1, 8]}, frames, tmp_path)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["main x1", "", "main x8", ""]
    with pytest.raises(MuonlabError, match="'muonclip' has several runs of seed"):
        drawn({"name": "figure", "kind": "arms"}, frames, tmp_path)


def test_schedules_need_no_runs(tmp_path, drawn):
    fig, _ = drawn({"name": "f", "kind": "polynomials"}, polynomials(), tmp_path)
    assert [len(ax.lines) for ax in fig.axes] == [2, 2]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["Jordan (5 steps)", "You (5 steps)"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "x", "kind": "swich"}, "did you mean 'switch'"),
        (
            {"name": "x", "kind": "traces", "tua": 3},
            "unknown setting of figure x .traces. 'tua'; did you mean 'tau'",
        ),
        ({"name": "x", "kind": "to_target"}, "the figure x .to_target. needs 'target'"),
        ({"kind": "traces"}, "a figure needs 'name'"),
        ({"name": "x", "kind": "traces", "tau": "high"}, "tau of figure x must be a number"),
        ({"name": "x", "kind": "traces", "arms": "muon"}, "arms of figure x must be a list"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused_before_any_run(spec, message):
    with pytest.raises(MuonlabError, match=message):
        read_figure(spec)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("levels", {}, "no condition of this figure varies a level"),
        ("mechanism", {}, "was never recorded; set trainer.spectra_every"),
        ("spectra", {"columns": ["svd_entropi/*"]}, "unknown recorded column"),
        ("balance", {}, "no run recorded expert loads"),
        ("switch", {}, "needs `windows`; set them on its condition"),
        ("spike_events", {"scores": ["none/such"]}, "no spike scores"),
        ("extrapolation", {}, "needs 4 sizes"),
        ("scaling", {}, "two or more computes"),
        ("to_target", {"target": 1.0, "baseline": "lion"}, "no seed has a value of the spending"),
    ],
)
def test_what_the_runs_do_not_hold_is_reported(kind, settings, message, make_frames, tmp_path):
    frames = make_frames(arms(["adamw", "muon"], level=1.0))
    with pytest.raises(MuonlabError, match=message):
        draw(read_figure({"name": "x", "kind": kind} | settings), frames, tmp_path, MADE)


def test_heads_that_were_not_kept_are_reported(make_frames, tmp_path):
    frames = make_frames(arms(["muon"]))
    frames = replace(frames, heads=frames.heads.head(0))
    with pytest.raises(MuonlabError, match="set `heads: true`"):
        draw(read_figure({"name": "x", "kind": "heads"}), frames, tmp_path, MADE)


def test_the_sample_counts_seeds_per_setting_and_leaves_short_runs_out_of_the_tokens(make_frames):
    runs = make_frames(
        [*sweep("muon", [1.0, 2.0]), {"arm": "adamw", "status": "diverged", "tokens": 5.0}]
    ).runs
    assert describe_sample(runs) == "7 runs, n=1 to 3 seeds each, 1 diverged; 30,720 tokens a run."
