"""Repairs a damaged record so that its run can resume: nothing is deleted, torn files are set aside."""

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.record.environment import Environment
from muonlab.record.files import remove_leftovers, set_aside
from muonlab.record.identity import names_another
from muonlab.record.mlflow_link import Link
from muonlab.record.parts import set_aside_torn as set_aside_torn_traces
from muonlab.record.state import FILE, OVER, State, read_state
from muonlab.record.stream import whole_until

NEEDED = ("config.yaml", "environment.json", "routing.json", FILE, "events.json")
SMALL = (*NEEDED, "mlflow.json")
# The fast parser, where libyaml is installed.
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def is_run(folder: Path) -> bool:
    """Whether there is a run in `folder`, damaged or not."""
    return any((folder / name).exists() for name in SMALL)


def ended(folder: Path, max_steps: int) -> State | None:
    """The state (see read_state) of a run that is over and whole; None where work remains: the run is not over,
    has no final metrics, or one of its files is missing or cannot be read. Raises EnvironmentFault for a file that the
    system refuses to read."""
    try:
        state = read_state(folder)
        if state is None or state["status"] not in OVER:
            return None
        if any(_torn(folder / name) for name in SMALL if name in NEEDED or (folder / name).exists()):
            return None
        recorded = whole_until(folder / "traces")
    except EnvironmentFault:
        raise
    except MuonlabError:
        return None
    # A run that was killed between its last step and its metrics may say that it is finished without having any.
    if state["status"] == "finished" and ("val_loss" not in state["metrics"] or recorded != max_steps - 1):
        return None
    return state


def set_aside_torn(folder: Path) -> list[Path]:
    """Rename the files of a record that cannot be read to `*.torn`, and remove the temporary files of killed processes.

    Only the holder of the lease may call it. Everything set aside can be written again: the config and the routing are
    those of the run's command, the environment is today's, the state is that of an interrupted run, and the traces are
    computed again from the checkpoint before their first hole (see stream.whole_until). Raises
    EnvironmentFault for a file that the system refuses to read, which does not prove that it is torn.
    """
    for place in (folder, folder / "traces", folder / "checkpoints"):
        remove_leftovers(place)
    small = [set_aside(folder / name) for name in SMALL if (folder / name).exists() and _torn(folder / name)]
    return small + set_aside_torn_traces(folder / "traces")


def _torn(path: Path) -> bool:
    read: dict[str, Callable[[Path], object]] = {
        "config.yaml": lambda path: _config(path),
        "environment.json": lambda path: Environment.read(dict(json.loads(_text(path)))),
        "routing.json": lambda path: [dict(route) for route in json.loads(_text(path))],
        FILE: lambda path: read_state(path.parent),
        "mlflow.json": lambda path: Link.read(path.parent),
        "events.json": lambda path: json.loads(_text(path)),
    }
    try:
        read[path.name](path)
    except EnvironmentFault:
        raise
    except (MuonlabError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return True
    return False


def _config(path: Path) -> None:
    if names_another(path.parent, yaml.load(_text(path), Loader=SafeLoader)):
        raise MuonlabError(f"{path} is not the config of its folder")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MuonlabError(f"{path} is missing") from error
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}") from error
