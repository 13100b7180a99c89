"""What tests of several packages share: a run that takes a second, on text that needs no network."""

import os

# Before torch is imported anywhere: two test workers whose threads spin are slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `make test ARGS=...` hands this on, where every make that a test starts would take it for its own.
os.environ.pop("ARGS", None)

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
from tiny_runs import TINY

# A busy machine is no failure, and main is not red by luck: the same examples every time. `--hypothesis-profile=free`
# draws others at every run.
settings.register_profile("muonlab", deadline=None, derandomize=True)
settings.register_profile("free", deadline=None, print_blob=True)
settings.load_profile("muonlab")


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` are skipped where there is no device.

    On a GPU compilers and libraries warn of much that is no fault (of TF32, of a leaf's gradient): shown, no error. An
    error out of a compiler would also be the compiler's failure."""
    if of_cuda := [item for item in items if item.get_closest_marker("cuda")]:
        import torch

        present = torch.cuda.is_available()
        for item in of_cuda:
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.skipif(not present, reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_signals():
    """Signals as in a terminal, also where the tests run in the background, which ignores some; and a command that is
    run in this process leaves handlers behind."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGUSR1: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny_overrides():
    """The overrides that make a run tiny, for commands."""
    return TINY


@pytest.fixture
def tiny(tmp_path):
    """compose(*overrides) -> the settings of a tiny run that keeps everything under tmp_path."""
    from muonlab.cli import compose_config, plain
    from muonlab.train.config import RunConfig, read_config

    def compose(*overrides: str) -> RunConfig:
        paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
        return read_config(plain(compose_config("train", [*TINY, *paths, *overrides])))

    return compose


@pytest.fixture
def own_registries(monkeypatch):
    """What a test's plug-ins register is gone after it."""
    from hydra.core.config_store import ConfigStore

    import muonlab.plugins
    import muonlab.train.recording  # the package's columns are registered before they are kept
    from muonlab.models.registry import MODELS
    from muonlab.optim.optimizers import OPTIMIZERS
    from muonlab.optim.rules import RULES
    from muonlab.train.providers import PROVIDERS
    from muonlab.train.schedule import SCHEDULES

    for registry in (OPTIMIZERS, MODELS, SCHEDULES):
        assert registry.names()  # those of the package are registered before the copies are made
        monkeypatch.setattr(registry, "_builders", dict(registry._builders))
        monkeypatch.setattr(registry, "_sections", dict(registry._sections))
    monkeypatch.setattr(muonlab.plugins, "_imported", {})
    providers, rules = list(PROVIDERS), dict(RULES)
    yield
    PROVIDERS[:] = providers
    RULES.clear()
    RULES.update(rules)
    for kind in ("optimizer", "model", "schedule"):
        ConfigStore.instance().repo.pop(kind, None)


PREPARE = """
import os, sys
from muonlab.record import prepare_store
assert "mlflow" not in sys.modules
prepare_store(f"sqlite:///{sys.argv[1]}/mlflow.db", "template", sys.argv[1])
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
"""


@pytest.fixture(scope="session")
def first_store(tmp_path_factory):
    """A store made by a process of its own, and what that printed. Making one takes seconds, copying does not."""
    folder = tmp_path_factory.mktemp("store")
    command = [sys.executable, "-c", PREPARE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return folder / "mlflow.db", done.stdout + done.stderr


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server (see tests/postgres.py); skips where none is installed."""
    from postgres import MISSING, programs, server

    if programs() is None:
        pytest.skip(MISSING)
    with server() as running:
        yield running
