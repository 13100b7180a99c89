"""The record of a run: its folder, its traces, its spikes, and the same in MLflow."""

from muonlab.record.environment import collect_environment
from muonlab.record.identity import run_identity
from muonlab.record.load import Run, load_run
from muonlab.record.run import STATUSES, RunRecord

__all__ = ["STATUSES", "Run", "RunRecord", "collect_environment", "load_run", "run_identity"]
