"""What measures gave of all steps is kept beside tables that have one step in several, and is what they give later."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.archive import load_frames, read_table, save_frames
from analysis.frames import Frames
from analysis.measures import parts_by_seed, read_quantity, run_parts
from analysis.readings import Readings, as_readings
from muonlab.errors import MuonlabError

STEPS, SEEDS, RATES = 1500, (1, 2), (0.01, 0.02)
OF_RUNS = [
    {"name": "tokens_to_target", "target": 3.0},
    {"name": "tokens_to_target", "target": 0.1},  # never reached
    {"name": "logit_at_loss", "target": 2.5},
    {"name": "growth", "column": "max_logit"},
]
OF_PAIRS = ["own_spike_score", "smallest_own_spike"]
OF_SWEEPS = [{"name": "slope", "of": OF_RUNS[0]}, {"name": "best_level", "of": OF_RUNS[2]}]


@pytest.fixture
def frames():
    """Two arms, two levels, two seeds: a falling loss with noise and a few spikes, and a growing max logit."""
    runs, steps = [], []
    for number, (arm, level, seed) in enumerate(
        (a, r, s) for a in ("adamw", "muon") for r in RATES for s in SEEDS
    ):
        draw = np.random.default_rng(number)
        step = np.arange(STEPS)
        loss = 1 + 4 * np.exp(-step / (200 + 5000 * level)) + 0.02 * draw.standard_normal(STEPS)
        loss[draw.choice(np.arange(500, STEPS), 5)] += 1.0
        identity = {
            "run": f"{arm}-{level}-{seed}",
            "arm": arm,
            "seed": seed,
            "condition": "c",
            "level": level,
        }
        identity |= {"optimizer": arm, "lr": level, "status": "finished"}
        runs.append(
            identity
            | {"num_steps": STEPS, "warmup_steps": 75, "initial_loss": 5.0, "folder": "", "loss": loss[-1]}
        )
        columns = {"step": step, "tokens": 64.0 * step, "train_loss": loss, "probe_loss": loss}
        steps.append(
            pd.DataFrame(columns | {"max_logit": 1 + step / 50 + draw.random(STEPS)}).assign(**identity)
        )
    none = pd.DataFrame(columns=["condition", "arm", "run", "seed"])
    return Frames(pd.DataFrame(runs), pd.concat(steps, ignore_index=True), none.head(0), none)


def measured(frames):
    """Every quantity of every run, pair and sweep."""
    adamw, muon = (parts_by_seed(frames.select(arms=[arm])) for arm in ("adamw", "muon"))
    values = [read_quantity(each).value(part) for each in OF_RUNS for part in run_parts(frames)]
    values += [
        read_quantity(each).value(side[seed])
        for each in OF_SWEEPS
        for side in (adamw, muon)
        for seed in SEEDS
    ]
    pairs = [{seed: part.levels[0] for seed, part in side.items()} for side in (adamw, muon)]
    return values + [
        read_quantity(each).of_pair(*(side[seed] for side in pairs)) for each in OF_PAIRS for seed in SEEDS
    ]


def test_measures_give_the_same_of_the_kept_tables_as_of_all_steps(frames, tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.archive.STEPS_BYTES", 1)
    live = measured(frames)
    save_frames(frames, tmp_path)
    frames.readings.save(tmp_path / "readings.csv")
    kept = load_frames(tmp_path)
    assert len(kept.steps) < len(frames.steps) / 10
    for now, before in zip(measured(kept), live, strict=True):
        assert now == pytest.approx(before, rel=1e-11, nan_ok=True)
    assert len(kept.readings.known) == len(frames.readings.known), "nothing was read again"
    another = read_quantity({"name": "logit_at_loss", "target": 2.0})
    with pytest.raises(MuonlabError, match=f"60 of {STEPS} steps of adamw-0.01-1 were kept, too few"):
        another.value(run_parts(kept)[0])
    assert another.value(run_parts(kept, rough=True)[0])[0] > 0, "a figure takes what there is"


def test_what_can_be_measured_again_is(frames, tmp_path):
    """So that a measure that changes changes the answers of every run whose steps are all kept."""
    before = measured(frames)
    save_frames(frames, tmp_path)
    known = dict.fromkeys(frames.readings.known, (7.0, 7.0))
    whole = replace(frames, readings=Readings(known))
    for now, then in zip(measured(whole), before, strict=True):
        assert now == pytest.approx(then, nan_ok=True)


@pytest.mark.parametrize(
    "text", ["quantity,run\na,b\n", "quantity,run,baseline,value,bound\na,b,,many,1\n", ""]
)
def test_readings_that_are_damaged_are_one_sentence(frames, tmp_path, text):
    save_frames(frames, tmp_path)
    (tmp_path / "readings.csv").write_text(text)
    with pytest.raises(MuonlabError, match=r"are damaged: readings\.csv cannot be read"):
        load_frames(tmp_path)


OF_ONE_RUN = {("a (of b)", "run", ""): (math.inf, 7.0), ("d", "1e5", ""): (math.nan, math.nan)}


@pytest.mark.parametrize("known", [OF_ONE_RUN, OF_ONE_RUN | {("c", "x+y", "z"): (1 / 3, 1 / 3)}])
def test_readings_come_back_as_they_were_saved(known, tmp_path):
    path = tmp_path / "readings.csv"
    Readings(known).save(path)
    again = as_readings(read_table(path)).known
    assert again.keys() == known.keys()
    for key, value in known.items():
        assert again[key] == pytest.approx(value, nan_ok=True)
    Readings().save(path)
    assert not path.exists(), "nothing measured, nothing kept"
