"""One run in MLflow: the parameters, curves and files of its folder, for tables and charts."""

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonlab.errors import MuonlabError, unknown_name
from muonlab.record.store import connect, in_one_sentence, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

TERMINAL = {
    "finished": "FINISHED",
    "diverged": "FINISHED",  # an outcome of the experiment, not a fault of the program
    "pruned": "KILLED",
    "interrupted": "KILLED",
    "out-of-memory": "FAILED",
    "failed": "FAILED",
}
"""MLflow's own status for each of ours; ours is the tag `muonlab.status`."""

KEYS = {
    "train_loss": "train/loss",
    "probe_loss": "probe/loss",
    "val_loss": "val/loss",
    "grad_norm": "optim/grad_norm",
    "gamma": "attn/gamma",
    "max_logit": "attn/max_logit",
    "entropy": "attn/entropy",
    "one_hot": "attn/one_hot",
    "balance": "moe/balance",
    "router": "moe/router",
    "experts": "moe/experts",
    "lr": "optim/lr",
    "tokens": "progress/tokens",
    "flops": "progress/flops",
    "seconds": "progress/seconds",
}
"""Where a column of the trace stands among MLflow's charts; columns not listed stand under `optim/`."""

EVERY_STEP = frozenset({"train_loss", "probe_loss", "val_loss", "grad_norm", "gamma", "max_logit"})
"""Columns charted at every step: a spike lasts one. A metric costs 0.1 ms (SQLite) to 0.3 ms (a server)."""
THINNED = 10
"""The other columns are charted at most once in so many steps; the Parquet artifacts have all of them."""

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
LONGEST_KEY = 250
LONGEST_PARAM = 6000
LONGEST_DIGEST = 36


class MlflowRun:
    """Writes one run.

    Only MlflowClient is used, which keeps no global state, so any number of runs may be open in a process.
    After `start`, a store that fails is reported as a warning and tried again at the next call: the record on
    disk is complete without it.
    """

    def __init__(self, client: "MlflowClient", tracking_uri: str, run_id: str, started_ms: int, logged: int):
        self.run_id = run_id
        self._client = client
        self._uri = tracking_uri
        self._started_ms = self._timestamp_ms = started_ms
        self._resumed_after = self._last_step = logged
        self._charted: dict[str, int] = {}
        self._pending: list[Metric] = []
        self._nonfinite = ""

    @classmethod
    def start(
        cls,
        tracking_uri: str,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        parent_run_id: str | None = None,
        run_id: str | None = None,
    ) -> "MlflowRun":
        """Open a run in an experiment that `prepare_store` made.

        `params` may be nested; they are logged flat, `optimizer.lr`. `run_id` goes on with that run: its
        parameters stay, differing ones are listed in the tag `muonlab.params_changed`, and steps that it has
        are not logged again; a run that the store no longer has is begun anew. Raises MuonlabError if the
        store cannot be used.
        """
        flat = dict(_flatten(params))
        with in_one_sentence(tracking_uri):
            client = connect(tracking_uri)
            held = _existing(client, run_id) if run_id else None
            if held is None:
                found = client.get_experiment_by_name(experiment)
                if found is None:
                    raise MuonlabError(
                        f"there is no MLflow experiment '{experiment}'; prepare_store makes it"
                    )
                parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
                held = client.create_run(found.experiment_id, run_name=name, tags=parent)
            else:
                client.update_run(held.info.run_id, status="RUNNING")
            logged = int(held.data.tags.get("muonlab.logged_step", -1))
            run = cls(client, tracking_uri, held.info.run_id, held.info.start_time, logged)
            run._describe(flat, held.data.params, {**tags, "muonlab.status": "running"})
        return run

    def log_dataset(self, name: str, digest: str) -> None:
        """Say which data the run read: `name`, and the first 36 characters of its `digest`."""
        with self._survive():
            from mlflow.entities import Dataset, DatasetInput, InputTag

            data = Dataset(name=name, digest=digest[:LONGEST_DIGEST], source_type="local", source=name)
            entry = DatasetInput(dataset=data, tags=[InputTag(key="mlflow.data.context", value="train")])
            self._client.log_inputs(self.run_id, datasets=[entry])

    def log_rows(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Chart rows of `RunRecord.flush` or `rows`: a `step` and the values measured at it.

        Values that are not finite are logged as they are (MLflow draws infinity at 1.8e308), counted in the
        metric `nonfinite`, and the first one is named in the tag `muonlab.nonfinite`.
        """
        for row in rows:
            if row["step"] > self._resumed_after:
                self._pending.extend(self._metrics(row))
        with self._survive():
            self._send()

    def log_folder(self, path: str | Path) -> None:
        """Log the record's files as artifacts; checkpoints stay where they are."""
        root = Path(path)
        with self._survive():
            for file in sorted(root.rglob("*")):
                place = file.relative_to(root)
                hidden = any(part.startswith(".") for part in place.parts)
                if file.is_file() and not hidden and place.parts[0] != "checkpoints":
                    folder = place.parent.as_posix() if len(place.parts) > 1 else None
                    self._client.log_artifact(self.run_id, str(file), folder)

    def finish(self, status: str, cause: str = "", metrics: Mapping[str, float] | None = None) -> None:
        """End the run with one of our final statuses; `metrics` are charted as `final/<name>`."""
        if status not in TERMINAL:
            raise unknown_name("final status", status, TERMINAL)
        final = {f"final/{name}": float(value) for name, value in (metrics or {}).items()}
        self._pending.extend(self._entities(final, max(self._last_step, 0)))
        with self._survive():
            self._send()
            for key, value in (("muonlab.status", status), ("muonlab.cause", cause)):
                if value:
                    self._client.set_tag(self.run_id, key, value)
            self._client.set_terminated(self.run_id, TERMINAL[status])

    def discard(self) -> None:
        """Delete a run that was begun in vain."""
        with self._survive():
            self._client.delete_run(self.run_id)

    def _metrics(self, row: Mapping[str, float]) -> "list[Metric]":
        step = int(row["step"])
        if "seconds" in row and math.isfinite(row["seconds"]):
            self._timestamp_ms = self._started_ms + round(1000 * row["seconds"])
        self._last_step = max(self._last_step, step)
        values = {}
        for column, value in row.items():
            due = step >= self._charted.get(column, -THINNED) + THINNED or not math.isfinite(value)
            if column != "step" and (due or column.partition("/")[0] in EVERY_STEP):
                values[metric_key(column)] = value
                self._charted[column] = step
        return self._entities(values, step)

    def _entities(self, values: dict[str, float], step: int) -> "list[Metric]":
        from mlflow.entities import Metric

        odd = [key for key, value in values.items() if not math.isfinite(value)]
        if odd:
            self._nonfinite = self._nonfinite or f"{odd[0]} = {values[odd[0]]} at step {step}"
            values = {**values, "nonfinite": float(len(odd))}
        return [Metric(key, float(value), self._timestamp_ms, step) for key, value in values.items()]

    def _send(self) -> None:
        from mlflow.entities import RunTag

        while self._pending:
            batch = self._pending[:METRICS_PER_REQUEST]
            # A batch may end inside a step, of which MLflow then has not everything.
            whole = self._last_step if len(batch) == len(self._pending) else batch[-1].step - 1
            tags = [RunTag("muonlab.logged_step", str(whole))]
            if self._nonfinite:
                tags.append(RunTag("muonlab.nonfinite", self._nonfinite))
            self._client.log_batch(self.run_id, metrics=batch, tags=tags)
            del self._pending[:METRICS_PER_REQUEST]

    def _describe(self, params: dict[str, str], held: dict[str, str], tags: dict[str, Any]) -> None:
        """Log the parameters that are new and the tags; tell the ones that differ from those held."""
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

    @contextmanager
    def _survive(self) -> Iterator[None]:
        try:
            with in_one_sentence(self._uri):
                yield
        except MuonlabError as error:
            warnings.warn(f"{error}; the run goes on, recorded in its folder", stacklevel=3)


def metric_key(column: str) -> str:
    """Where a trace column is charted: `train_loss` under `train/loss`, `max_logit/layer_00` under
    `attn/max_logit/layer_00`, `update_rms/query` under `optim/update_rms/query`."""
    name, slash, rest = column.partition("/")
    return re.sub(r"[^\w\-. /:]", "_", KEYS.get(name, f"optim/{name}") + slash + rest)[:LONGEST_KEY]


def _existing(client: "MlflowClient", run_id: str) -> Any:
    """The run, or None if the store has lost or deleted it: a store is a cache, the folder is the record."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf, the text as Hydra writes it: null, true, 0.03, [1, 2]."""
    if isinstance(value, Mapping) and (value or not key):
        for name, item in value.items():
            yield from _flatten(item, f"{key}.{name}" if key else str(name))
        return
    text = value if isinstance(value, str) else json.dumps(value)
    key = re.sub(r"[^\w\-. /:]", "_", key)
    yield key[:LONGEST_KEY], without_password(text)[:LONGEST_PARAM]
