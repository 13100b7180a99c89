"""The state of a run: status.json in its folder, which any process may read and which may be damaged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from annotated_types import MinLen

from muonlab.errors import MuonlabError
from muonlab.record.files import read_json
from muonlab.record.lease import held
from muonlab.settings.check import Text, check

FILE = "status.json"
STATUSES = ("running", "finished", "diverged", "pruned", "out-of-memory", "failed", "interrupted")
OVER = ("finished", "diverged", "out-of-memory")
"""Statuses after which nothing remains to be done: outcomes of the settings, which would recur on a second try."""
# Infinities and NaN are text, since JSON has no numbers for them.
SHAPE: dict[str, Any] = {
    "status": Text,
    "cause": str,
    "metrics": Mapping[str, int | float | Literal["inf", "-inf", "nan"]],
    "sessions": Annotated[Sequence[Mapping[str, object]], MinLen(1)],
}


class Session(TypedDict):
    """One process that computed a part of the run, as an Owner; started and ended: ISO 8601; torn: the names of files
    that it set aside."""

    host: str
    pid: int
    pid_started: NotRequired[int | None]
    machine: NotRequired[str | None]
    started: NotRequired[str]
    ended: NotRequired[str]
    torn: NotRequired[list[str]]


class State(TypedDict):
    """The content of status.json: one of STATUSES, why, the final metrics, and the sessions, of which there is one at
    least."""

    sessions: list[Session]
    status: str
    cause: str
    metrics: dict[str, float | str]


def read_state(folder: Path) -> State | None:
    """The state of the run in `folder`; None where there is none. Raises MuonlabError for one that is damaged."""
    state = read_json(folder / FILE)
    if state is None:
        return None
    try:
        values = check(Mapping[str, object], state, "it")
        checked = {key: check(shape, values.get(key), key) for key, shape in SHAPE.items()}
        for key, kind in (("host", str), ("pid", int)):
            check(kind, checked["sessions"][-1].get(key), f"the last session's {key}")
    except MuonlabError as error:
        raise MuonlabError(f"the run in {folder} is damaged: {FILE}: {error}") from error
    return cast(State, values)


def writer_alive(folder: Path) -> bool | None:
    """Whether a process is writing the run in `folder`; None if its writer was on another machine, which
    cannot be queried from here."""
    lease = held(folder)
    return lease.alive() if lease else False
