"""Small made-up runs with the shapes of real ones: Muon's logits climb, MuonClip's stay at tau, AdamW's are
low."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.drawing.canvas import style
from analysis.frames import Frames, collect

TAU = 30.0
CONTEXT = 64
FLOOR = {"adamw": 1.90, "muon": 2.02, "muonclip": 1.88}


def made_up_run(
    optimizer: str,
    seed: int,
    num_steps: int = 120,
    lr: float = 0.03,
    status: str = "finished",
    off: tuple[int, int] | None = None,
) -> SimpleNamespace:
    """What load_run returns, for a run of 2 layers and 2 heads; `off` = steps in which MuonClip's clip is
    off."""
    noise = np.random.default_rng([seed, len(optimizer), num_steps])
    step = np.arange(num_steps)
    progress = step / num_steps
    floor = FLOOR[optimizer] + 0.02 * noise.standard_normal()
    clean = floor + (5.55 - floor) * np.exp(-14 * progress) + 0.25 * np.exp(-3 * progress)
    level = {"adamw": 25.0, "muon": 800.0, "muonclip": 900.0}[optimizer]
    logit = 2 * (level / 2) ** np.clip(progress * 1.4, 0, 1) * np.exp(0.05 * noise.standard_normal(num_steps))
    gamma = np.ones(num_steps)
    if optimizer == "muonclip":
        on = np.ones(num_steps, bool)
        if off:
            on[off[0] : off[1]] = False
            since = np.clip(step - off[0], 0, None) / num_steps
            clean = clean + np.where(on, 0, 1.2 * since)
            logit = np.where(on, logit, TAU * np.exp(12 * since))
        gamma = np.where(on, np.minimum(1, TAU / logit), 1.0)
        logit = np.where(on, np.minimum(logit, TAU * (1 + 0.04 * noise.random(num_steps))), logit)
    train = clean + 0.08 * noise.standard_normal(num_steps)
    if status == "diverged":
        train[-1] = np.nan
    steps = pd.DataFrame(
        {
            "step": step,
            "tokens": 1024.0 * (step + 1),
            "seconds": 0.1 * (step + 1),
            "train_loss": train,
            "lr": lr * np.minimum(1, (step + 1) / (num_steps // 10)),
            "grad_norm": 0.4
            * np.exp(0.2 * noise.standard_normal(num_steps))
            * (1 + 4 * np.exp(-30 * progress)),
            "probe_loss": np.where((step % 5 == 0) | (step == num_steps - 1), clean, np.nan),
            "val_loss": np.where(step == num_steps - 1, clean + 0.01, np.nan),
        }
    )
    heads = [
        pd.DataFrame(
            {
                "step": step,
                "layer": layer,
                "head": head,
                "value": logit * (1 if (layer, head) == (0, 1) else 0.3),
                "value_abs": logit * (1 if (layer, head) == (0, 1) else 0.3),
                "exact": True,
                "gamma": gamma if (layer, head) == (0, 1) else 1.0,
                "entropy": np.where(step % 5 == 0, 3.2 / (1 + logit / 20), np.nan),
                "one_hot": np.where(step % 5 == 0, 0.1 * head, np.nan),
            }
        )
        for layer in range(2)
        for head in range(2)
    ]
    config: dict[str, Any] = {
        "seed": seed,
        "model": {"name": "nanogpt", "context": CONTEXT},
        "optimizer": {
            "name": optimizer,
            "lr": lr,
            "weight_decay": 0.0,
            "tau": TAU if optimizer == "muonclip" else None,
        },
    }
    return SimpleNamespace(
        config=config,
        setting=lambda section, key: config[section].get(key),
        status=status,
        cause="" if status == "finished" else "the loss is not finite",
        metrics={},
        steps=steps,
        stream=lambda trace: _pieces(pd.concat(heads, ignore_index=True)),
        events=pd.DataFrame(
            {
                "step": [num_steps // 2] if optimizer == "muon" else [],
                "definition": "olmo2",
                "series": "train_loss",
            }
        ),
        spike_scores={"olmo2_upward/train_loss": 0.5 if optimizer == "muon" else 0.0},
    )


def _pieces(heads):
    """As `Run.stream` gives the heads: in order of steps, whole steps at a time."""
    heads = heads.sort_values("step", kind="stable", ignore_index=True)
    cut = int(np.searchsorted(heads["step"], heads["step"].max() // 3))
    return iter([heads.iloc[:cut], heads.iloc[cut:]])


@pytest.fixture(autouse=True)
def drawn_in_style():
    """Panels are drawn as `draw` does, in the style sheet's look."""
    with style():
        yield


@pytest.fixture(scope="session")
def make_run():
    """`made_up_run` for tests."""
    return made_up_run


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Put made-up runs under folder names, as load_run would find them: `runs(muon_1=run)` gives the
    folders."""
    known = {}
    monkeypatch.setattr("analysis.frames.load_run", lambda folder: known[folder.name])

    def register(**named):
        known.update(named)
        return [tmp_path / name for name in named]

    return register


@pytest.fixture
def frames(runs):
    """Two seeds each of AdamW, Muon (the second diverged) and MuonClip."""
    arms = {}
    for optimizer in FLOOR:
        for seed in (1, 2):
            status = "diverged" if (optimizer, seed) == ("muon", 2) else "finished"
            run = made_up_run(optimizer, seed, status=status)
            arms.setdefault(optimizer, []).extend(runs(**{f"{optimizer}-s{seed}": run}))
    return collect(arms)


@pytest.fixture
def long_frames(runs, make_run):
    """Three arms of three seeds with 400 steps: long enough for every test of a run."""
    arms = {}
    for optimizer in ("adamw", "muon", "muonclip"):
        for seed in (1, 2, 3):
            arms.setdefault(optimizer, []).extend(
                runs(**{f"{optimizer}{seed}": make_run(optimizer, seed, num_steps=400)})
            )
    return collect(arms)


def made_up_cell(
    condition="main",
    arm="muon",
    level=np.nan,
    seed=1,
    loss=2.0,
    logit=100.0,
    status="finished",
    lr=0.03,
    **more,
):
    """One run of 60 steps as tables (runs, steps, heads): the loss falls to `loss`, the max logit rises to `logit`.

    more: columns of the run (weight_decay, flops, ...), or a dict `steps` of columns of its steps.
    """
    steps, num_steps = more.pop("steps", {}), 60
    noise = np.random.default_rng([seed, round(1000 * loss)])
    step = np.arange(num_steps)
    curve = loss + 3 * np.exp(-step / 6)
    trace = logit ** ((step + 1) / num_steps) * np.exp(0.02 * noise.standard_normal(num_steps))
    row = {"run": f"{condition}-{arm}-{level}-{seed}", "condition": condition, "arm": arm, "level": level}
    row |= {"optimizer": arm.partition("-")[0], "lr": lr, "seed": seed, "status": status}
    table = pd.DataFrame(
        row
        | {"step": step, "tokens": 512.0 * (step + 1), "flops": 1e9 * (step + 1), "seconds": 0.1 * (step + 1)}
        | {"scheduled_lr": lr * np.minimum(1, (step + 1) / 6), "train_loss": curve, "max_logit": trace}
        | {"probe_loss": np.where(step % 5 == 0, curve, np.nan), "grad_norm": 1 + noise.random(num_steps)}
        | {
            "gamma": np.minimum(1, 30 / trace) if "clip" in arm else np.nan,
            "loss_spikes": 0,
            "grad_spikes": 0,
        }
        | steps
    )
    settled = status == "finished"
    run = row | {
        "weight_decay": 0.0,
        "tau": 30.0 if "clip" in arm else np.nan,
        "folder": "",
        "warmup_steps": 5,
    }
    run |= {"tokens": 512.0 * num_steps, "flops": 1e9 * num_steps, "seconds": 6.0, "initial_loss": 5.5}
    run |= {
        "val_loss": loss if settled else np.nan,
        "loss": loss if settled else 5.5,
        "max_logit": trace.max(),
    }
    run |= {"end_max_logit": logit, "clipped_share": 0.0, "spikes/olmo2/grad_norm": 0.0} | more
    heads = [
        pd.DataFrame(
            row
            | {"step": step, "layer": i, "head": 0, "value": trace / (i + 1), "gamma": 1.0, "entropy": 1.0}
        )
        for i in range(2)
    ]
    return pd.DataFrame([run]), table if settled else table.head(30), pd.concat(heads)


@pytest.fixture(scope="session")
def make_frames():
    """`make_frames([{...}, {...}])`: frames of one `made_up_cell` a mapping."""

    def make(cells):
        runs, steps, heads = zip(*(made_up_cell(**cell) for cell in cells), strict=True)
        tables = (pd.concat(parts, ignore_index=True) for parts in (runs, steps, heads))
        return Frames(*tables, pd.DataFrame())

    return make
