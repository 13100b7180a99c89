import itertools
import shutil

import pytest
import torch

from muonlab.record import MlflowRun, RunRecord, prepare_store, store_uri
from muonlab.record.environment import Environment

CONFIG = {
    "seed": 1,
    "optimizer": {"name": "muonclip", "lr": 1e-5, "tau": 30, "betas": [0.9, 0.95], "windows": None},
    "trainer": {"max_steps": 700, "device": "cpu"},
    "paths": {"runs": "somewhere"},
}


@pytest.fixture
def config():
    return {key: dict(value) if isinstance(value, dict) else value for key, value in CONFIG.items()}


@pytest.fixture
def record(tmp_path, config):
    record = RunRecord.create(
        tmp_path / "run", config, [{"name": "w", "shape": [3, 4]}], Environment(host="here")
    )
    yield record
    record.close()


@pytest.fixture(scope="session")
def append_steps():
    """Appends steps with values that depend on the step alone, two layers of three heads."""

    def append(record, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            logits = torch.randn(2, 3, generator=generator)
            record.append(
                step,
                {"train_loss": torch.rand((), generator=generator), "lr": 0.1 * step, "seconds": float(step)},
                {"max_logit": logits, "max_logit_abs": logits.abs(), "gamma": torch.ones(2, 3)},
            )

    return append


@pytest.fixture
def store(tmp_path, first_store, monkeypatch):
    """The URI of a fresh store with the experiment "lab"."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(first_store[0], tmp_path / "mlflow.db")
    uri = store_uri(None, tmp_path)
    prepare_store(uri, "lab", tmp_path / "artifacts")
    return uri


@pytest.fixture
def begin(store, tmp_path):
    """Starts a run in the experiment "lab", of a folder of its own or of the one given."""
    numbers = itertools.count()

    def start(params=None, tags=None, folder=None, **settings):
        folder = folder or tmp_path / f"shown-{next(numbers)}"
        folder.mkdir(exist_ok=True)
        return MlflowRun.start(store, "lab", "muon-lr1e-2-s1", params or {}, tags or {}, folder, **settings)

    return start
