"""Checks of settings: each says in one sentence what is wrong, what was given and what is allowed."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from muonlab.errors import MuonlabError, unknown_name


def check_number(setting: str, value: Any, low: float = 0.0, below: float = math.inf) -> None:
    """Raise MuonlabError unless low <= value < below. A one-element tensor (a learning rate that a captured graph reads) passes unread."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low <= value < below):
        limit = f"at least {low:g}" + (f" and below {below:g}" if below < math.inf else " and finite")
        raise MuonlabError(f"{setting} must be a number of {limit}, not {value!r}")


def check_flag(setting: str, value: Any) -> None:
    """Raise MuonlabError unless value is True or False."""
    if not isinstance(value, bool):
        raise MuonlabError(f"{setting} must be true or false, not {value!r}")


def check_choice(setting: str, value: Any, known: Iterable[str]) -> None:
    """Raise MuonlabError unless value is one of the known names."""
    if value not in (names := list(known)):
        raise unknown_name(setting, value, names)


def check_settings(kind: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise MuonlabError for the first given name that is not a setting."""
    names = list(known)
    for name in given:
        if name not in names:
            raise unknown_name(kind, name, names)
