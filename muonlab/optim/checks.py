"""Checks of settings: each says in one sentence what is wrong, what was given and what is allowed."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from muonlab.errors import MuonlabError, unknown_name

# From NumPy's kinds of numbers to Python's.
_PLAIN = ((np.bool_, bool), (np.integer, int), (np.floating, float), (np.str_, str))


def plain_value(value: Any) -> Any:
    """The same value without NumPy's types and lists, so that `torch.load(weights_only=True)` takes it.

    NumPy's numbers become Python's, exactly but for those of more than 64 bits; arrays, lists and tuples become
    tuples of plain values. Tensors, names, dicts and everything else stay what they are.
    """
    if isinstance(value, np.generic):
        kind = next((plain for numpy, plain in _PLAIN if isinstance(value, numpy)), None)
        return value if kind is None else kind(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(map(plain_value, value)) if isinstance(value, list | tuple) else value


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
