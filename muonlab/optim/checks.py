"""Checks of settings: each says in one sentence what is wrong, what was given and what is allowed."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from muonlab.errors import MuonlabError, unknown_name


def check_number(setting: str, value: Any, below: float = math.inf) -> None:
    """Raise MuonlabError unless 0 <= value < below.

    A one-element tensor passes unread: a learning rate that a captured graph reads from the device.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value < below):
        limit = "finite" if below == math.inf else f"below {below:g}"
        raise MuonlabError(f"{setting} must be a number of at least 0 and {limit}, not {value!r}")


def check_flag(setting: str, value: Any) -> None:
    """Raise MuonlabError unless value is True or False."""
    if not isinstance(value, bool):
        raise MuonlabError(f"{setting} must be true or false, not {value!r}")


def check_choice(setting: str, value: Any, known: Iterable[str]) -> None:
    """Raise MuonlabError unless value is one of the known names."""
    if value not in (names := list(known)):
        raise unknown_name(setting, value, names)
