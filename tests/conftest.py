"""What tests of several packages share: a run that takes a second, on text that needs no network."""

import os

# Before torch is imported anywhere: two test workers whose threads spin are slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# A busy machine is no failure, and main is not red by luck: the same examples every time.
settings.register_profile("muonlab", deadline=None, derandomize=True)
settings.load_profile("muonlab")

TINY = [
    "data=synthetic",
    "data.train_tokens=20000",
    "data.val_tokens=4000",
    "model.context=16",
    "model.d_model=16",
    "model.num_layers=2",
    "trainer=smoke",
    "trainer.batch_size=4",
    "trainer.probe_batch_size=4",
    "trainer.max_steps=12",
    "trainer.checkpoint_every=4",
    "trainer.val_every=6",
    "trainer.probe_every=3",
    "trainer.progress=false",
    "schedule.warmup=2",
    "tracking=none",
]


@pytest.fixture
def tiny_overrides():
    """The overrides that make a run tiny, for commands."""
    return TINY


@pytest.fixture
def tiny(tmp_path):
    """compose(*overrides) -> a resolved config of a tiny run that keeps everything under tmp_path."""
    from muonlab.cli import compose_config, plain

    def compose(*overrides: str, config_name: str = "train") -> dict:
        paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
        return plain(compose_config(config_name, [*TINY, *paths, *overrides]))

    return compose
