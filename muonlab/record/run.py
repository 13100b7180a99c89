"""The record of a run: a folder with what was asked for, what it was computed with, and what happened.

    config.yaml          the resolved config
    environment.json     commit, versions, hardware, command line
    routing.json         which parameter is optimized by what, and why
    plugins/             the source of its plug-ins, if it has any
    status.json          its state: status, cause, final metrics, the processes that computed it
    traces/              full-resolution traces (Parquet): parts while it runs, one file of each once it has ended
    events.json          loss spikes, with the definitions that found them
    mlflow.json          the MLflow run that shows the same
    .lease-000001        who is writing it, while it is written

Every file is written whole or not at all, so a run killed at any moment is still a record.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from muonlab.errors import EnvironmentFault, MuonlabError, unknown_name
from muonlab.record.charts import chart_parts
from muonlab.record.environment import Environment, collect_environment
from muonlab.record.files import temporary_path, write_atomic, write_json
from muonlab.record.identity import run_identity
from muonlab.record.lease import Lease
from muonlab.record.mend import is_run, set_aside_torn
from muonlab.record.owner import Owner
from muonlab.record.score import SERIES, describe_spikes
from muonlab.record.state import FILE, STATUSES, Session, State, read_state
from muonlab.record.stream import read_trace
from muonlab.record.trace import TraceWriter

if TYPE_CHECKING:
    import torch


class RunRecord:
    """The one writer of a run's folder, which holds its lease. Made by `create` or `reopen`, ended by `finish`, and
    then closed: only `close` releases the lease, so that MLflow is written to under it.

    If another process has taken over the lease, every method that writes raises LeaseLost and writes nothing.
    """

    def __init__(self, folder: Path, lease: Lease):
        self.folder = folder
        self.lease = lease
        self.torn: list[Path] = []
        self._traces = TraceWriter(folder / "traces")
        self._state = read_state(folder) or State(sessions=[], status="running", cause="", metrics={})

    @classmethod
    def create(
        cls,
        folder: str | Path,
        config: Mapping[str, object],
        routing: Sequence[Mapping[str, object]],
        environment: Environment | None = None,
        sources: Mapping[str, bytes] | None = None,
    ) -> "RunRecord":
        """Begin the record of a run that has none yet; its status is `running`.

        `environment` None: that of this process. The folder appears with everything in it, so that no kill leaves half
        a record and only one of two processes can begin the same run. Raises MuonlabError if it
        holds something already, EnvironmentFault if it cannot be written.
        """
        folder = Path(folder)
        if (folder / "config.yaml").exists():
            _refuse_other_run(folder, config)
            raise MuonlabError(f"{folder} holds this run already; reopen it or move it away")
        new = temporary_path(folder)
        try:
            new.mkdir(parents=True)
        except OSError as error:
            raise _refusal(folder, error) from error
        record = cls(new, Lease.take(new))
        try:
            record.describe(config, routing, environment, sources)
            record._open_session()
            os.replace(new, folder)
        except BaseException as error:
            record.close()
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(error, OSError):
                raise _refusal(folder, error) from error
            raise
        record.lease.moved(folder)
        return cls(folder, record.lease)

    @classmethod
    def reopen(
        cls,
        folder: str | Path,
        config: Mapping[str, object] | None = None,
        routing: Sequence[Mapping[str, object]] | None = None,
        environment: Environment | None = None,
        sources: Mapping[str, bytes] | None = None,
    ) -> "RunRecord":
        """Resume the record of an interrupted run; follow with `truncate` to the step of its checkpoint.

        Files that cannot be read are set aside (`torn` lists them) and written again from `config`, `routing` and
        `environment` if those are passed. Raises MuonlabError if there is no run, or if `config` is another run's;
        EnvironmentFault if another process is writing it.
        """
        folder = Path(folder)
        if not is_run(folder):
            raise MuonlabError(f"no run in {folder}: it has no config.yaml")
        lease = Lease.take(folder)
        try:
            torn = set_aside_torn(folder)
            if (folder / "config.yaml").exists() and config is not None:
                _refuse_other_run(folder, config)
            elif config is None and not (folder / "config.yaml").exists():
                raise MuonlabError(f"no run in {folder}: it has no config.yaml")
            record = cls(folder, lease)
            record.torn = torn
            if config is not None and routing is not None:
                record.describe(config, routing, environment, sources)
            record._open_session()
        except BaseException:
            lease.release()
            raise
        return record

    def describe(
        self,
        config: Mapping[str, object],
        routing: Sequence[Mapping[str, object]],
        environment: Environment | None = None,
        sources: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write those of config.yaml, environment.json, routing.json and `sources`, {path in the folder: content}, that
        are missing."""
        text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
        if not (self.folder / "config.yaml").exists():
            write_atomic(self.folder / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
        if not (self.folder / "environment.json").exists():
            write_json(self.folder / "environment.json", (environment or collect_environment()).values())
        if not (self.folder / "routing.json").exists():
            write_json(self.folder / "routing.json", [dict(route) for route in routing])
        for name, content in (sources or {}).items():
            path = self.folder / name
            if not path.exists() or path.read_bytes() != content:  # torn, since the source is in the identity
                write_atomic(path, partial(Path.write_bytes, data=content))

    def close(self) -> None:
        """Release the lease. A run that was not finished counts as interrupted and can be reopened."""
        self.lease.release()

    @property
    def status(self) -> str:
        """One of STATUSES."""
        return self._state["status"]

    def append(
        self,
        step: int,
        scalars: Mapping[str, "float | torch.Tensor"],
        heads: Mapping[str, "torch.Tensor"] | None = None,
        loads: Mapping[int, "torch.Tensor"] | None = None,
    ) -> None:
        """Remember one step's values, without waiting for the device (see TraceWriter.append)."""
        self._traces.append(step, scalars, heads, loads)

    def flush(self) -> None:
        """Write what was appended to disk."""
        self.lease.check()
        self._traces.flush()

    def rows(self, after: int = -1) -> Iterator[list[dict[str, float]]]:
        """What is on disk of the steps after `after`, as lists of rows for `MlflowRun.log_rows` (see chart_parts)."""
        return chart_parts(self.folder / "traces", after)

    def truncate(self, step: int) -> None:
        """Drop every row after `step`: -1 drops all. A resumed run computes them again."""
        self.lease.check()
        self._traces.truncate(step)

    def finish(self, status: str, cause: str = "", metrics: Mapping[str, float] | None = None) -> None:
        """End the run: write what is buffered, merge the traces, score the spikes, and set the status.

        `cause` is one sentence for every status but `finished`; `metrics` are the final numbers, infinities
        and NaN included. Raises MuonlabError for a status that does not end a run.
        """
        ends = STATUSES[1:]
        if status not in ends:
            raise unknown_name("final status", status, ends)
        self.lease.check()
        self._traces.flush()
        self._traces.merge()
        write_json(
            self.folder / "events.json", describe_spikes(read_trace(self.folder / "traces", "steps", SERIES))
        )
        self._state["status"], self._state["cause"] = status, cause
        self._state["metrics"] = {name: _json_number(value) for name, value in (metrics or {}).items()}
        self._state["sessions"][-1]["ended"] = _now()
        self._write_state()

    def _open_session(self) -> None:
        this = Owner.this()
        session = Session(
            host=this.host,
            pid=this.pid,
            pid_started=this.pid_started,
            machine=this.machine,
            started=_now(),
        )
        if self.torn:
            session["torn"] = [path.name for path in self.torn]
        self._state["sessions"].append(session)
        self._state["status"], self._state["cause"], self._state["metrics"] = "running", "", {}
        self._write_state()

    def _write_state(self) -> None:
        write_json(self.folder / FILE, self._state)


def _refuse_other_run(folder: Path, config: Mapping[str, object]) -> None:
    ours, theirs = (
        run_identity(config),
        run_identity(yaml.safe_load((folder / "config.yaml").read_text("utf-8"))),
    )
    if ours != theirs:
        raise MuonlabError(f"{folder} holds another run ({theirs}, not {ours}); choose another folder")


def _refusal(folder: Path, error: OSError) -> MuonlabError:
    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        return EnvironmentFault(f"cannot write {folder}: {error.strerror or error}")
    if (folder / "config.yaml").exists():
        return EnvironmentFault(f"another process began {folder} at the same moment")
    return MuonlabError(f"{folder} holds files that are not a run; choose another folder")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _json_number(value: float) -> float | str:
    """JSON has no infinities and no NaN: they are written as text, which float() reads."""
    number = value if isinstance(value, int) else float(value)
    return number if isinstance(number, int) or abs(number) < float("inf") else str(number)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
