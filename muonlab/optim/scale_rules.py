"""By how much an orthogonalised update of shape (rows, cols) is multiplied before the learning rate.

An orthogonal (rows, cols) matrix has spectral norm 1, Frobenius norm sqrt(min) and entries of RMS
1/sqrt(max(rows, cols)). Each rule fixes one of these over shapes, and so gives the learning rate its unit.
"""

import math
from collections.abc import Callable

from muonlab.errors import unknown_name

ADAMW_RMS = 0.2  # RMS of a typical AdamW update: Moonlight, arXiv 2502.16982, section 2.2


def original(rows: int, cols: int) -> float:
    """sqrt(max(1, rows/cols)): lr is the spectral norm of a wide matrix's update (Keller Jordan, Muon, 2024)."""
    return math.sqrt(max(1.0, rows / cols))


def match_rms_adamw(rows: int, cols: int) -> float:
    """0.2 sqrt(max(rows, cols)): lr has AdamW's unit, entries move by 0.2 lr (arXiv 2502.16982, equation 4)."""
    return ADAMW_RMS * math.sqrt(max(rows, cols))


def unit_update_rms(rows: int, cols: int) -> float:
    """sqrt(max(rows, cols)): lr is the RMS of the update's entries (called "spectral" in Emerging-Optimizers)."""
    return math.sqrt(max(rows, cols))


def spectral(rows: int, cols: int) -> float:
    """sqrt(rows/cols): lr is the update's RMS-to-RMS operator norm, so it transfers over width (arXiv 2310.17813; dion)."""
    return math.sqrt(rows / cols)


def none(rows: int, cols: int) -> float:
    """1: lr is the spectral norm of the update, whatever the shape."""
    return 1.0


SCALE_RULES: dict[str, Callable[[int, int], float]] = {
    rule.__name__: rule for rule in (original, match_rms_adamw, unit_update_rms, spectral, none)
}


def scale_factor(rule: str, rows: int, cols: int) -> float:
    """The factor of one named rule; an unknown name raises MuonlabError."""
    if rule not in SCALE_RULES:
        raise unknown_name("scale rule", rule, SCALE_RULES)
    return SCALE_RULES[rule](rows, cols)
