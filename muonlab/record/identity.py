"""What makes two runs the same run: the digest of what was asked for, not of where it was computed."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from muonlab.errors import MuonlabError

ELSEWHERE = frozenset({"paths", "tracking", "force"})
"""Top-level keys that say where a run is kept or whether it is repeated, not what it computes."""
HARDWARE = frozenset({"device", "devices", "strategy", "progress", "num_threads"})
"""Keys of the group `trainer` that say on what it is computed."""


def run_identity(config: Mapping[str, object]) -> str:
    """Ten hex digits (40 bits of SHA-256) of the resolved config without ELSEWHERE and trainer's HARDWARE.

    The same on every machine, for every order of keys, and for 1 and 1.0: a Hydra override `lr=1` means the
    same number. What is null or false is off and does not count, so that a setting which a later version adds, and
    which is off by default, leaves the identities of all runs alone. Plug-ins, {place: digest of the source}, count by
    their sources and not by their places. Raises MuonlabError for a value that no config
    file could hold.
    """
    kept = {key: value for key, value in config.items() if key not in ELSEWHERE}
    if isinstance(trainer := kept.get("trainer"), Mapping):
        kept["trainer"] = {key: value for key, value in trainer.items() if key not in HARDWARE}
    if isinstance(plugins := kept.get("plugins"), Mapping):
        kept["plugins"] = sorted(plugins.values())
    text = json.dumps(_canonical(kept, "config"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def names_another(folder: Path, config: Mapping[str, object]) -> bool:
    """Whether a run's folder ends in another identity than its config has, as the beginning of a torn file has."""
    digest = re.search(r"-([0-9a-f]{10})$", folder.name)
    return digest is not None and digest[1] != run_identity(config)


def _canonical(value: object, where: str) -> object:
    if isinstance(value, Mapping):
        return {
            str(key): _canonical(item, f"{where}.{key}")
            for key, item in value.items()
            if item is not None and item is not False
        }
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise MuonlabError(
        f"{where} holds a {type(value).__name__}; a config holds mappings, lists, text, numbers"
    )
