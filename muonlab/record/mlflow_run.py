"""One run in MLflow: the parameters, curves and files of its folder, for tables and charts."""

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from muonlab.errors import MuonlabError, unknown_name
from muonlab.record.columns import chart_of
from muonlab.record.mlflow_link import FILE, Link
from muonlab.record.store import connect, in_one_sentence
from muonlab.settings.address import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

TERMINAL = {
    "finished": "FINISHED",
    "diverged": "FINISHED",  # an outcome of the experiment, not a fault of the program
    "pruned": "KILLED",
    "interrupted": "KILLED",
    "out-of-memory": "FAILED",
    "failed": "FAILED",
}
"""MLflow's own status for each of ours; ours is the tag `muonlab.status`."""

THINNED = 10
"""Columns that are not charted at every step are charted at most once in this many steps; the Parquet artifacts hold
every step."""

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
LONGEST_KEY = 250
LONGEST_PARAM = 6000
LONGEST_TAG = 8000
LONGEST_DIGEST = 36
MOST_PENDING = 20_000
"""Points kept in memory while the store fails; beyond them they are read from the record again."""
UNSHOWN = re.compile(rf"checkpoints$|lease-|\.|{re.escape(FILE)}")
"""Files and folders of a record that are not results and so are not logged as artifacts."""


class MlflowRun:
    """Writes one run, which the mlflow.json of a folder names.

    Only MlflowClient is used, which keeps no global state, so any number of runs may be open in a process.
    After `start`, a store that fails is reported in one warning and tried again by later calls: the record on disk is
    complete without it, and mlflow.json says whether MLflow is.

    What is charted is a function of the record alone: the time of a point is that of its step, and which steps of a
    thinned column are shown follows from the steps at which it was measured. The store keeps the last step of every
    metric, in the transaction that adds its points, so that each is charted once, whenever and wherever a kill struck.
    """

    def __init__(self, client: "MlflowClient", tracking_uri: str, run: "Run", link: Link, folder: Path):
        self.run_id: str = run.info.run_id
        self._client, self._uri, self._link, self._folder = client, tracking_uri, link, folder
        self._charted: dict[str, int] = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._nonfinite = self._sent_nonfinite = run.data.tags.get("muonlab.nonfinite", "")
        self._last: Mapping[str, float] = {"step": self.first_step}
        self._pending: list[Metric] = []
        self._whole = True  # whether the store accepted everything but points
        self._behind = self._warned = False
        self._retry_at = 0.0

    @property
    def first_step(self) -> int:
        """The step of the first row that the store may lack something of; 0 where it has none."""
        return max(self._charted.values(), default=0)

    @classmethod
    def start(
        cls,
        tracking_uri: str,
        experiment: str,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, object],
        folder: Path,
        parent_run_id: str | None = None,
    ) -> "MlflowRun":
        """Open the run of `folder` in an experiment that `prepare_store` made.

        `params` may be nested; they are logged flat, `optimizer.lr`. If the folder already has a run, that run is
        continued: its parameters stay, differing ones are listed in the tag `muonlab.params_changed`, and points that
        it has are not logged again. A run that the store no longer has is created anew. Raises EnvironmentFault if the
        store cannot be reached, MuonlabError if it cannot be used.
        """
        flat = dict(_flatten(params))
        link = Link.of(folder)
        with in_one_sentence(tracking_uri):
            client = connect(tracking_uri)
            place = client.get_experiment_by_name(experiment)
            if place is None:
                raise MuonlabError(f"there is no MLflow experiment '{experiment}'; prepare_store makes it")
            held = _existing(client, link.run_id) if link.run_id else None
            held = held or link.find(client, place.experiment_id, folder)
            ours = link.tags(folder)
            if held is None:
                if parent_run_id:
                    ours["mlflow.parentRunId"] = parent_run_id
                held = client.create_run(place.experiment_id, link.begun_ms, run_name=name, tags=ours)
            elif held.info.status != "RUNNING":
                client.update_run(held.info.run_id, status="RUNNING")
            link = link.keep(folder, run_id=held.info.run_id, complete=False)
            run = cls(client, tracking_uri, held, link, folder)
            run._describe(flat, held.data.params, {**tags, **ours, "muonlab.status": "running"})
        return run

    def log_dataset(self, name: str, digest: str) -> None:
        """Log the dataset that the run read: its `name`, and the first 36 characters of its `digest`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name=name, digest=digest[:LONGEST_DIGEST], source_type="local", source=name)
        entry = DatasetInput(dataset=data, tags=[InputTag(key="mlflow.data.context", value="train")])
        self._whole &= self._survives(lambda: self._client.log_inputs(self.run_id, datasets=[entry]))

    def log_rows(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Chart rows of the record that will not change any more, in the order of their steps: a `step` and the values
        measured at it (see chart_rows). Points that are already charted are skipped.

        Values that are not finite are logged as they are (MLflow draws infinity at 1.8e308), counted in the
        metric `nonfinite`, and the first one is named in the tag `muonlab.nonfinite`.
        """
        for row in rows:
            self._last = dict(row)
            if not self._behind:
                self._pending.extend(self._metrics(row))
            if len(self._pending) >= METRICS_PER_REQUEST:
                self._try_to_send()
        self._try_to_send()

    def note(self, markdown: str) -> None:
        """Set the run's description, which its page shows as Markdown; MLflow keeps its first 8000 characters."""
        self._whole &= self._survives(lambda: self._tag({"mlflow.note.content": markdown[:LONGEST_TAG]}))

    def log_curve(self, name: str, points: Mapping[int, float]) -> None:
        """Chart a value at each of some whole numbers, such as trials; a curve that the store has is left as it is."""
        from mlflow.entities import Metric

        key = _allowed(name)
        if key in self._charted:
            return
        # At the time at which the run began, so that a store takes a point from two processes once.
        metrics = [Metric(key, value, self._link.begun_ms, step) for step, value in sorted(points.items())]
        self._charted |= {key: max(points, default=0)}
        self._whole &= self._survives(lambda: self._client.log_batch(self.run_id, metrics=metrics))

    def log_folder(self, path: str | Path) -> None:
        """Log the record's files as artifacts, except for checkpoints, which stay where they are."""
        self._whole &= self._survives(lambda: self._log_files(Path(path)))

    def finish(self, status: str, cause: str = "", metrics: Mapping[str, float] | None = None) -> None:
        """End the run with one of our final statuses; `metrics` are charted as `result/<name>`.

        mlflow.json then says that MLflow is complete, unless the store refused anything.
        """
        if status not in TERMINAL:
            raise unknown_name("final status", status, TERMINAL)
        final = {f"result/{name}": float(value) for name, value in (metrics or {}).items()}
        self._pending.extend(self._entities(final, self._last, final))
        self._survives(lambda: self._end(status, cause))

    def _end(self, status: str, cause: str) -> None:
        self._send()
        self._tag({"muonlab.status": status, "muonlab.cause": cause})
        self._client.set_terminated(self.run_id, TERMINAL[status])
        if self._whole and not self._behind:
            self._link = self._link.keep(self._folder, complete=True)

    def _log_files(self, root: Path) -> None:
        for file in sorted(root.rglob("*")):
            place = file.relative_to(root)
            if file.is_file() and not any(UNSHOWN.match(part) for part in place.parts):
                folder = place.parent.as_posix() if len(place.parts) > 1 else None
                self._client.log_artifact(self.run_id, str(file), folder)

    def _metrics(self, row: Mapping[str, float]) -> "list[Metric]":
        step, values = int(row["step"]), {}
        for column, value in row.items():
            if column == "step":
                continue
            last = self._charted.get(metric_key(column), -1)
            # Of a thinned column the first value in each window of steps is shown.
            due = step // THINNED > last // THINNED or chart_of(column.partition("/")[0]).every_step
            if step > last and (due or not math.isfinite(value)):
                values[metric_key(column)] = value
        return self._entities(values, row, {metric_key(column): value for column, value in row.items()})

    def _entities(
        self, values: dict[str, float], row: Mapping[str, float], measured: Mapping[str, float]
    ) -> "list[Metric]":
        """The points of a row that the store does not have yet, at the time at which the step ended."""
        from mlflow.entities import Metric

        step, seconds = int(row["step"]), row.get("seconds", 0.0)
        odd = [key for key, value in measured.items() if not math.isfinite(value)]
        if odd:
            self._nonfinite = self._nonfinite or f"{odd[0]} = {measured[odd[0]]} at step {step}"
            values = {**values, "nonfinite": float(len(odd))}
        at = self._link.begun_ms + (round(1000 * seconds) if math.isfinite(seconds) else 0)
        new = {key: value for key, value in values.items() if step > self._charted.get(key, -1)}
        self._charted |= dict.fromkeys(new, step)
        return [Metric(key, float(value), at, step) for key, value in new.items()]

    def _try_to_send(self) -> None:
        """Send what is pending, unless the store failed less than ten times the duration of that failure ago."""
        begun = time.monotonic()
        if begun >= self._retry_at and not self._survives(self._send):
            self._retry_at = time.monotonic() + 10 * (time.monotonic() - begun)
        if len(self._pending) > MOST_PENDING:
            self._pending, self._behind = [], True

    def _send(self) -> None:
        while self._pending:
            batch = self._pending[:METRICS_PER_REQUEST]
            self._client.log_batch(self.run_id, metrics=batch)
            del self._pending[: len(batch)]
        if self._nonfinite and self._nonfinite != self._sent_nonfinite:
            self._tag({"muonlab.nonfinite": self._nonfinite})
            self._sent_nonfinite = self._nonfinite

    def _tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _describe(self, params: dict[str, str], held: dict[str, str], tags: Mapping[str, object]) -> None:
        """Log the tags and the new parameters; list parameters that differ from the stored ones in a tag."""
        from mlflow.entities import Param, RunTag

        changed = [
            f"{key}: {held[key]} -> {value}" for key, value in params.items() if held.get(key, value) != value
        ]
        if changed:
            tags = {**tags, "muonlab.params_changed": "; ".join(changed)[:LONGEST_PARAM]}
        new = [Param(key, value) for key, value in params.items() if key not in held]
        for begin in range(0, len(new), PARAMS_PER_REQUEST):
            self._client.log_batch(self.run_id, params=new[begin : begin + PARAMS_PER_REQUEST])
        self._client.log_batch(
            self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items() if value is not None]
        )

    def _survives(self, action: Callable[[], object]) -> bool:
        """Whether the store accepted what `action` sends; the first failure is a warning."""
        try:
            with in_one_sentence(self._uri):
                action()
        except MuonlabError as error:
            if not self._warned:
                text = (
                    "the run continues and is recorded in its folder, and the next command completes MLflow"
                )
                warnings.warn(f"{error}; {text}", stacklevel=3)
            self._warned = True
            return False
        return True


def metric_key(column: str) -> str:
    """Where a trace column is charted: `train_loss` under `loss/train`, `entropy/layer_00` under
    `softmax/entropy/layer_00`, `update_rms/query` under `optim/update_rms/query`."""
    name, slash, rest = column.partition("/")
    return _allowed(chart_of(name).key + slash + rest)


def _allowed(key: str) -> str:
    """A metric's key in the characters and the length that MLflow takes."""
    return re.sub(r"[^\w\-. /:]", "_", key)[:LONGEST_KEY]


def _existing(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run, or None if the store has lost or deleted it: a store is a cache, the folder is the record."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _flatten(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf, the text as Hydra writes it: null, true, 0.03, [1, 2]."""
    if isinstance(value, Mapping) and (value or not key):
        for name, item in value.items():
            yield from _flatten(item, f"{key}.{name}" if key else str(name))
        return
    text = value if isinstance(value, str) else json.dumps(value)
    key = re.sub(r"[^\w\-. /:]", "_", key)
    yield key[:LONGEST_KEY], without_password(text)[:LONGEST_PARAM]
