"""Reading a run's folder back, whether it finished, was killed or still runs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from typing_extensions import TypeForm

from muonlab.errors import MuonlabError, unknown_name
from muonlab.record.environment import Environment
from muonlab.record.files import read_json
from muonlab.record.identity import names_another, run_identity
from muonlab.record.parts import KEYS, schema_of
from muonlab.record.score import SERIES, score_run
from muonlab.record.state import FILE, read_state, writer_alive
from muonlab.record.stream import read_trace, stream_trace, trace_extent
from muonlab.settings.check import check


class Run:
    """A recorded run. The small files are read at once, the traces when they are first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: Mapping[str, object] = _config(folder / "config.yaml")
        self.environment = Environment.read(_whole(folder / "environment.json", Mapping[str, object]))
        self.routing: Sequence[Mapping[str, object]] = _whole(
            folder / "routing.json", Sequence[Mapping[str, object]]
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

    def setting(self, section: str, key: str) -> object:
        """One setting of the recorded config, such as "optimizer", "lr"; None where it has none."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row per step, float64: step (int64), then columns.SCALARS, then all other recorded columns, sorted by
        name. NaN: not measured at that step, or measured and not a number. Held in memory whole: 160 bytes per step of
        20 columns."""
        return read_trace(self._traces, "steps").to_pandas()

    @cached_property
    def max_logits(self) -> pd.DataFrame:
        """One row per step, layer and head (int32): value (signed max logit of the step's forward, over batch and
        visible pairs), value_abs, exact (bool: both are the maxima, or both upper bounds, see trainer.exact_every),
        gamma (QK-Clip's factor, 1: not clipped), entropy (nats), one_hot (share of attention rows with a weight
        above 0.95). NaN: not measured. 53 bytes per row: `stream` reads long runs piece by piece."""
        return self._read("max_logits")

    @cached_property
    def experts(self) -> pd.DataFrame:
        """One row per step, layer that has experts and expert (int32): load, the share of the step's choices that
        fell on the expert (1 / experts: balanced). Without rows where the model is dense."""
        return self._read("experts")

    def stream(self, trace: str) -> Iterator[pd.DataFrame]:
        """The rows of `steps`, `max_logits` or `experts` in order, as frames of whole steps with at most 65,536 rows,
        or one step: the memory does not grow with the length of the run. One frame without rows where the run has no
        such trace. Raises MuonlabError for another name."""
        if trace not in KEYS:
            raise unknown_name("trace", trace, KEYS)
        return _frames(trace, stream_trace(self._traces, trace))

    def _read(self, trace: str) -> pd.DataFrame:
        schema, rows = trace_extent(self._traces, trace)
        return _frame(trace, schema, rows, stream_trace(self._traces, trace, schema.names))

    @property
    def _traces(self) -> Path:
        return self.folder / "traces"

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
        return score_run(read_trace(self._traces, "steps", SERIES))


def _frames(trace: str, pieces: Iterator[pa.Table]) -> Iterator[pd.DataFrame]:
    first = next(pieces, schema_of(trace, []).empty_table())
    for piece in chain([first], pieces):
        yield _frame(trace, piece.schema, len(piece), [piece])


def _frame(trace: str, schema: pa.Schema, rows: int, pieces: Iterable[pa.Table]) -> pd.DataFrame:
    """Pieces as one frame, into which each is copied as it comes; `rows` is how many they have, or more."""
    kinds = {
        pa.int64(): np.int64 if trace == "steps" else np.int32,
        pa.bool_(): np.bool_,
        pa.float64(): np.float64,
    }
    arrays = {field.name: np.empty(rows, kinds[field.type]) for field in schema}
    filled = 0
    for piece in pieces:
        begin, filled = filled, filled + len(piece)
        for name, array in arrays.items():
            if filled > len(array):  # the run went on meanwhile
                array.resize(filled, refcheck=False)
            array[begin:filled] = piece[name].to_numpy()
    for array in arrays.values():
        array.resize(filled, refcheck=False)
    return pd.DataFrame(arrays, copy=False)


def _whole(path: Path, kind: TypeForm[Any]) -> Any:
    content = read_json(path)
    if content is None:
        raise MuonlabError(f"the run in {path.parent} is damaged: it has no {path.name}")
    try:
        return check(kind, content, path.name)
    except MuonlabError as error:
        raise MuonlabError(f"the run in {path.parent} is damaged: {error}") from error


def _config(path: Path) -> Mapping[str, object]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MuonlabError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise MuonlabError(f"the run in {path.parent} is damaged: {path.name} is not a mapping of settings")
    if names_another(path.parent, config):
        raise MuonlabError(
            f"the run in {path.parent} is damaged: {path.name} is not the config of its folder"
        )
    return config


def load_run(folder: str | Path) -> Run:
    """Read the run recorded in `folder`.

    A run whose process died without ending it is `interrupted`; one whose process was on another machine and left its
    lease behind stays `running`, since that cannot be checked from here. Raises MuonlabError if `folder` holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MuonlabError(
            f"no run in {folder}: {'it is not a' if folder.exists() else 'there is no such'} folder"
        )
    if not (folder / "config.yaml").exists():
        raise MuonlabError(f"no run in {folder}: it has no config.yaml")
    return Run(folder)
