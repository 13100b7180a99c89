"""Reading a run's folder back, whether it finished, was killed or still runs."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from muonlab.errors import MuonlabError
from muonlab.record.environment import Environment
from muonlab.record.files import read_json
from muonlab.record.identity import run_identity
from muonlab.record.score import SERIES, score_run
from muonlab.record.state import FILE, read_state, writer_alive
from muonlab.record.stream import read_trace
from muonlab.settings.check import check


class Run:
    """A recorded run. The small files are read at once, the traces when they are first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: Mapping[str, Any] = _config(folder / "config.yaml")
        self.environment = Environment.read(_whole(folder / "environment.json", Mapping[str, Any]))
        self.routing: Sequence[Mapping[str, Any]] = _whole(
            folder / "routing.json", Sequence[Mapping[str, Any]]
        )
        state = read_state(folder)
        if state is None:
            raise MuonlabError(f"the run in {folder} is damaged: it has no {FILE}")
        self.status: str = state["status"]
        self.cause: str = state["cause"]
        # Infinities and NaN are kept as text, since JSON has no numbers for them.
        metrics = state["metrics"].items()
        self.metrics: dict[str, float] = {k: float(v) if isinstance(v, str) else v for k, v in metrics}
        if self.status == "running" and writer_alive(folder) is False:
            last = state["sessions"][-1]
            self.status, self.cause = "interrupted", f"process {last['pid']} on {last['host']} was killed"

    @property
    def identity(self) -> str:
        """The digest of the config (see run_identity)."""
        return run_identity(self.config)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row a step, float64: step (int), then trace.SCALARS, then whatever else was recorded, sorted by
        name. NaN: not measured at that step, or measured and not a number."""
        return read_trace(self.folder / "traces", "steps").to_pandas()

    @cached_property
    def max_logits(self) -> pd.DataFrame:
        """One row per step, layer and head (ints): value (signed max logit of the step's forward, over batch and
        visible pairs), value_abs, exact (bool: both are the maxima, or both upper bounds, see trainer.exact_every),
        gamma (QK-Clip's factor, 1: not clipped), entropy (nats), one_hot (share of attention rows with a weight
        above 0.95). NaN: not measured."""
        return read_trace(self.folder / "traces", "max_logits").to_pandas()

    @cached_property
    def experts(self) -> pd.DataFrame:
        """One row per step, layer that has experts and expert (ints): load, the share of the step's choices that
        fell on the expert (1 / experts: balanced). Without rows where the model is dense."""
        return read_trace(self.folder / "traces", "experts").to_pandas()

    @property
    def events(self) -> pd.DataFrame:
        """Spikes of the trace by today's definitions, sorted by step: step, value, definition, height, peak,
        duration (see detect_spikes) and series, the column that spiked."""
        return self._scored[0]

    @property
    def spike_scores(self) -> dict[str, float]:
        """Percentage of flagged steps by "<definition>/<column>" (see score_run)."""
        return self._scored[1]

    @cached_property
    def _scored(self) -> tuple[pd.DataFrame, dict[str, float]]:
        return score_run(read_trace(self.folder / "traces", "steps", SERIES))


def _whole(path: Path, kind: Any) -> Any:
    content = read_json(path)
    if content is None:
        raise MuonlabError(f"the run in {path.parent} is damaged: it has no {path.name}")
    try:
        return check(kind, content, path.name)
    except MuonlabError as error:
        raise MuonlabError(f"the run in {path.parent} is damaged: {error}") from error


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MuonlabError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise MuonlabError(f"the run in {path.parent} is damaged: {path.name} is no mapping of settings")
    return config


def load_run(folder: str | Path) -> Run:
    """Read the run recorded in `folder`.

    A run whose process died without ending it is `interrupted`; one whose process was on another machine and left its
    lease stays `running`, since nothing here can tell. Raises MuonlabError if `folder` holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MuonlabError(
            f"no run in {folder}: {'it is no' if folder.exists() else 'there is no such'} folder"
        )
    if not (folder / "config.yaml").exists():
        raise MuonlabError(f"no run in {folder}: it has no config.yaml")
    return Run(folder)
