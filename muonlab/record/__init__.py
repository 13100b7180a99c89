"""The record of a run: its folder, its traces, its spikes, and the same in MLflow."""

from muonlab.record.environment import collect_environment
from muonlab.record.identity import run_identity
from muonlab.record.load import Run, load_run
from muonlab.record.mlflow_run import MlflowRun
from muonlab.record.run import STATUSES, RunRecord
from muonlab.record.spikes import detect_spikes, spike_score
from muonlab.record.store import prepare_store, store_uri

__all__ = [
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
