"""By how much an orthogonalised update of shape (rows, cols) is multiplied before the learning rate.

An orthogonal (rows, cols) matrix has spectral norm 1, Frobenius norm sqrt(min(rows, cols)) and entries of RMS
1/sqrt(max(rows, cols)). Each rule keeps another of these fixed over shapes, and so gives lr its unit.
"""

import math
from collections.abc import Callable

ADAMW_RMS = (
    0.2  # RMS of the entries of a typical AdamW update over lr: Moonlight, arXiv 2502.16982, section 2.2
)


def original(rows: int, cols: int) -> float:
    """sqrt(max(1, rows/cols)): lr is the spectral norm of a wide update. Keller Jordan, Muon, 2024."""
    return math.sqrt(max(1.0, rows / cols))


def match_rms_adamw(rows: int, cols: int) -> float:
    """0.2 sqrt(max(rows, cols)): entries move by 0.2 lr, as AdamW's do. arXiv 2502.16982, equation 4."""
    return ADAMW_RMS * math.sqrt(max(rows, cols))


def unit_update_rms(rows: int, cols: int) -> float:
    """sqrt(max(rows, cols)): lr is the RMS of the entries' change. "spectral" in Emerging-Optimizers."""
    return math.sqrt(max(rows, cols))


def spectral(rows: int, cols: int) -> float:
    """sqrt(rows/cols): lr is the RMS-to-RMS operator norm, alike at every width. arXiv 2310.17813."""
    return math.sqrt(rows / cols)


def none(rows: int, cols: int) -> float:
    """1: lr is the spectral norm of the update, whatever the shape."""
    return 1.0


SCALE_RULES: dict[str, Callable[[int, int], float]] = {
    rule.__name__: rule for rule in (original, match_rms_adamw, unit_update_rms, spectral, none)
}
