"""The record of a run: its folder, its traces, its spikes, and the same in MLflow."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from muonlab.record.environment import collect_environment
    from muonlab.record.identity import run_identity
    from muonlab.record.load import Run, load_run
    from muonlab.record.mlflow_run import MlflowRun
    from muonlab.record.run import RunRecord
    from muonlab.record.spikes import detect_spikes, spike_score
    from muonlab.record.state import OVER, STATUSES
    from muonlab.record.store import prepare_store, store_uri

__all__ = [
    "OVER",
    "STATUSES",
    "MlflowRun",
    "Run",
    "RunRecord",
    "collect_environment",
    "detect_spikes",
    "load_run",
    "prepare_store",
    "run_identity",
    "spike_score",
    "store_uri",
]

_MODULES = {
    "OVER": "state",
    "STATUSES": "state",
    "MlflowRun": "mlflow_run",
    "Run": "load",
    "RunRecord": "run",
    "collect_environment": "environment",
    "detect_spikes": "spikes",
    "load_run": "load",
    "prepare_store": "store",
    "run_identity": "identity",
    "spike_score": "spikes",
    "store_uri": "store",
}


def __getattr__(name: str) -> object:
    """Imports a name's module when it is first asked for: checking settings needs neither pandas nor Arrow."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
