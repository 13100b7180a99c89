"""Runs that are killed, and whether one ended as a run that nobody disturbed did."""

import pandas as pd
import pytest
import torch

from muonlab.record import load_run
from muonlab.train.recording import Recording
from muonlab.train.run import run_folder, train


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may handle it."""


def assert_equal(one, other):
    runs = load_run(one), load_run(other)
    assert [run.status for run in runs] == ["finished", "finished"]
    assert runs[0].metrics == runs[1].metrics
    for frame in ("steps", "max_logits", "events"):
        a, b = (getattr(run, frame) for run in runs)
        pd.testing.assert_frame_equal(
            a.drop(columns="seconds", errors="ignore"),
            b.drop(columns="seconds", errors="ignore"),
            check_exact=True,
        )
    names = [sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt")) for folder in (one, other)]
    assert names[0] == names[1] == ["step-00000008.ckpt", "step-00000012.ckpt"]
    states = [
        torch.load(folder / "checkpoints" / names[0][-1], weights_only=True)["state_dict"]
        for folder in (one, other)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    left = [
        path.name for path in other.rglob("*") if path.name.endswith((".tmp", ".new")) or "lease" in path.name
    ]
    assert not left
    assert not [path.name for path in other.parent.iterdir() if path.name.startswith(f".{other.name}")]


def kill_at(step):
    def on_step(done):
        if done == step:
            raise Killed

    return on_step


def stopped(config, monkeypatch, step=10):
    """A run that was killed in its step 10 of 12, two steps after its checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "finish", lambda *_: None)
        with pytest.raises(Killed):
            train(config, on_step=kill_at(step))
    return run_folder(config)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
