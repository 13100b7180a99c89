"""The sweep's table and how tables are written."""

import pandas as pd
import pytest

from analysis.comparison import compare_arms, t_interval
from analysis.tables import as_markdown, as_text, comparison_table, save_table
from muonlab.errors import MuonlabError


def test_one_row_per_arm_with_interval_difference_and_cost(frames):
    table = comparison_table(frames.runs, "adamw", trials={"adamw": 5, "muon": 6, "muonclip": 7})
    table = table.set_index("optimizer")
    assert list(table.index) == ["AdamW", "Muon", "MuonClip"]
    losses = frames.runs.loc[frames.runs["arm"] == "muonclip", "val_loss"]
    assert table.loc["MuonClip", "validation loss"] == str(t_interval(losses))
    assert table["trials"].tolist() == [5, 6, 7]
    assert table["tokens"].tolist() == ["122,880"] * 3
    assert table.loc["MuonClip", "setting"] == "lr=0.03 wd=0 tau=30"
    assert table.loc["AdamW", "setting"] == "lr=0.03 wd=0"
    assert table.loc["Muon", "spike score"] == "0.5"
    assert table.loc["AdamW", "against AdamW"] == ""
    paired = compare_arms(frames.runs, "muonclip", "adamw")
    assert table.loc["MuonClip", "against AdamW"].startswith(f"{paired.difference.estimate:+.3f} [")
    assert table.loc["MuonClip", "against AdamW"].endswith(paired.word(paired.p))


def test_diverged_seeds_are_counted_and_stay_in_the_mean(frames):
    row = comparison_table(frames.runs, "adamw").set_index("optimizer").loc["Muon"]
    assert (row["seeds"], row["diverged"]) == (2, 1)
    assert float(row["validation loss"].split()[0]) > 3.5, "the diverged seed counts with the first loss"


def test_an_arm_without_a_finished_run_still_has_its_row(frames):
    runs = frames.runs.copy()
    gone = runs["arm"] == "muon"
    runs.loc[gone, ["loss", "val_loss"]] = float("nan")
    runs.loc[gone, "status"] = "interrupted"
    row = comparison_table(runs, "adamw").set_index("optimizer").loc["Muon"]
    assert (row["validation loss"], row["against AdamW"]) == ("none finished", "no shared seed")


def test_single_seeds_show_the_difference_without_a_direction(frames):
    table = comparison_table(frames.runs[frames.runs["seed"] == 1], "adamw").set_index("optimizer")
    assert table.loc["MuonClip", "against AdamW"].endswith("(n=1)")
    assert table.loc["MuonClip", "p (Holm)"] == ""


def test_unknown_baseline_is_refused(frames):
    with pytest.raises(MuonlabError, match="'sgd' has no run; arms: adamw, muon, muonclip"):
        comparison_table(frames.runs, "sgd")


def test_text_is_aligned_and_markdown_escaped():
    table = pd.DataFrame({"arm": ["a", "long name"], "value|unit": [1, 22.5]})
    lines = [
        "arm        value|unit",
        "---------------------",
        "a                 1.0",
        "long name        22.5",
    ]
    assert as_text(table).splitlines() == lines
    assert as_markdown(table.assign(arm=["a|b", "c"])).splitlines()[2] == "| a\\|b | 1.0 |"


def test_numbers_are_aligned_right_and_words_left():
    table = pd.DataFrame(
        {"claim": ["a", "b"], "effect": ["x0.5", "-"], "tokens": ["1,000", "-"], "p": [0.1, 2]}
    )
    assert as_markdown(table).splitlines()[1] == "|---|---|---:|---:|"
    assert as_text(table).splitlines()[2:] == ["a      x0.5     1,000  0.1", "b      -            -  2.0"]
    assert as_markdown(table.head(0)).splitlines()[1] == "|---|---|---|---|"


def test_tables_are_written_in_three_forms(tmp_path):
    table = pd.DataFrame({"arm": ["a"], "loss": ["1.5 [1.4, 1.6]"]})
    paths = save_table(table, tmp_path / "new", "comparison")
    assert pd.read_csv(paths["csv"]).equals(table)
    assert paths["md"].read_text().startswith("| arm | loss |\n|---|---|\n")
    assert paths["txt"].read_text() == as_text(table) + "\n"
