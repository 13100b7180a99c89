"""The report: one page that needs nothing else, says every answer once in the table, and is the same every time."""

import base64
import io
import json
import re
import shutil
from html import unescape

import pytest
import yaml
from PIL import Image, ImageChops, ImageStat

from analysis import report as module
from analysis.archive import save_frames
from analysis.redraw import redraw
from analysis.report import embedded, main, report
from muonlab.errors import MuonlabError

CLAIMS = [
    {
        "claim": "Muon & friends <explode>",
        "source": "K2 Fig 2",
        "answer": "contradicted",
        "contradicts": "D6: who?",
    },
    {"claim": "The clip holds", "source": "K2 Fig 3", "answer": "reproduced", "contradicts": ""},
]


@pytest.fixture(scope="module")
def results(make_frames, tmp_path_factory):
    """Two experiments: one with answers and a figure, one with a figure alone."""
    results = tmp_path_factory.mktemp("results")
    for name in ("first", "second_one"):
        folder = results / name
        save_frames(make_frames([{"arm": a, "seed": s} for a in ("adamw", "muon") for s in (1, 2)]), folder)
        figure = {"name": f"{name}-traces", "kind": "traces", "about": "A figure of both."}
        spec = {
            "question": f"What does {name} ask?",
            "prediction": "Nothing.",
            "seeds": [1, 2],
            "figures": [figure],
        }
        (folder / "experiment.yaml").write_text(yaml.safe_dump(spec))
        made = {"command": f"make {name}", "commit": "0123456789abc", "dirty": False, "date": "2026-01-02"}
        (folder / "made.json").write_text(json.dumps(made))
        if name == "first":
            more = {
                "n": 5,
                "effect": "loss -0.1 [-0.2, 0.0] nats",
                "side": "us",
                "figure": figure["name"],
                "note": "",
            }
            (folder / "answers.json").write_text(json.dumps([claim | more for claim in CLAIMS]))
        redraw(folder)
    return results


def images(page):
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_the_page_needs_no_network_and_all_its_links_lead_somewhere(results):
    page = report(results)
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', page)
    assert "url(" not in page
    assert "<script" not in page
    anchors = set(re.findall(r'id="([^"]+)"', page))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= anchors
    assert {"answers", "disputed", "method", "e-first", "e-second_one", "f-first-first-traces"} <= anchors
    for tag in ("table", "tr", "td", "figure", "dl", "nav", "h2", "p", "span"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_every_claim_is_in_the_table_with_its_answer_in_words(results):
    page = report(results)
    assert "Muon &amp; friends &lt;explode&gt;" in page
    table = unescape(page.partition('id="answers"')[2].partition("<h2")[0])
    rows = re.findall(r"<tr>(.*?)</tr>", table)[1:]
    assert len(rows) == len(CLAIMS)
    for row, claim in zip(rows, CLAIMS, strict=True):
        assert claim["claim"] in row
        assert claim["source"] in row
        assert "loss -0.1 [-0.2, 0.0] nats" in row
        assert f'class="v {claim["answer"]}">{claim["answer"]}</span>' in row
        assert '<td class="n">5</td>' in row
    disputed = page.partition('id="disputed"')[2].partition("<h2")[0]
    assert "D6: who?" in disputed
    assert "The clip holds" not in disputed
    assert re.search(r"<b>1</b><span[^>]*>contradicted", page)
    assert re.search(r"<b>0</b><span[^>]*>equivalent", page)


def test_every_experiment_says_how_to_repeat_it(results):
    page = report(results)
    for name in ("first", "second_one"):
        section = page.partition(f'<h2 id="e-{name}">')[2].partition("<h2")[0]
        assert f"What does {name} ask?" in section
        assert f"<dt>Repeat</dt><dd><code>make {name}</code></dd>" in section
        assert "<dt>Commit</dt><dd>012345678</dd>" in section
        assert "<dt>Date</dt><dd>2026-01-02</dd>" in section
        assert "<dt>Runs</dt><dd>4</dd>" in section
        caption = re.search(r"<figcaption>(.*?)</figcaption>", section)[1]
        assert caption.startswith(f"<b>{name}-traces.</b> A figure of both.")
        assert "n=2 seeds each" in caption


def test_figures_are_embedded_without_the_caption_that_is_printed_below_them(results):
    path = results / "first" / "first-traces.png"
    picture = embedded(path, 2070)
    whole, cut = Image.open(path), images(f'<img src="{picture.data}"')[0]
    assert cut.width == whole.width
    assert 0.8 * whole.height < cut.height < whole.height
    assert (picture.width, picture.height) == (round(whole.width / 300 * 96), round(cut.height / 300 * 96))
    kept = whole.convert("L").crop((0, 0, *cut.size))
    far = ImageChops.difference(cut.convert("L"), kept).point(lambda level: 255 * (level > 16))
    assert ImageStat.Stat(far).mean[0] < 1, (
        "fewer than one pixel in 255 differs by more than the reduced colours do"
    )
    assert picture.caption.startswith("A figure of both.")


def test_the_same_files_give_the_same_page_within_its_size(results, monkeypatch):
    page = report(results)
    assert report(results) == page
    full = images(page)
    monkeypatch.setattr(module, "BYTES", len(page) // 2)
    small = images(report(results))
    assert len(small) == len(full) == 2
    assert small[0].width < full[0].width


def test_what_is_missing_is_reported(results, tmp_path, monkeypatch):
    copied = shutil.copytree(results, tmp_path / "copied")
    (copied / "first" / "first-traces.png").unlink()
    with pytest.raises(MuonlabError, match=r"first-traces\.png was not drawn; draw all figures first"):
        report(copied)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "nothing")])
    with pytest.raises(MuonlabError, match="no experiment is kept"):
        main()


def test_the_command_writes_the_page_where_it_is_reported(results, tmp_path, capsys, monkeypatch):
    out = tmp_path / "deep" / "page.html"
    monkeypatch.setattr("sys.argv", ["report", str(results), "--out", str(out)])
    main()
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_text(encoding="utf-8") == report(results)
