"""What measures gave of runs while every step was at hand: the tables that are kept have one step in several."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from muonlab.record.files import write_atomic

# A quantity in words, the run or runs that it is of, and those that they are compared with ("": none).
Key = tuple[str, str, str]
Value = tuple[float, float]
COLUMNS = ("quantity", "run", "baseline", "value", "bound")


@dataclass
class Readings:
    """Values of quantities by run, added to as they are computed.

    value, bound: as `Quantity.value` gives them.
    """

    known: dict[Key, Value] = field(default_factory=dict)

    def get(self, key: Key, compute: Callable[[], Value], anew: bool) -> Value:
        """What `compute` gives where that is wanted `anew` or nothing is known, and is known from then on."""
        if anew or key not in self.known:
            self.known[key] = compute()
        return self.known[key]

    def save(self, path: Path) -> None:
        """Write a CSV file of COLUMNS, whole or not at all; none where nothing was measured."""
        if not self.known:
            path.unlink(missing_ok=True)
            return
        rows = [(*key, *value) for key, value in sorted(self.known.items())]
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        write_atomic(
            path, lambda draft: table.to_csv(draft, index=False, float_format="%.12g", lineterminator="\n")
        )


def as_readings(table: pd.DataFrame) -> Readings:
    """What `Readings.save` wrote, as read from its file. Raises KeyError or ValueError for another table."""
    keys = table[["quantity", "run", "baseline"]].astype(object).fillna("").itertuples(index=False, name=None)
    values = table[["value", "bound"]].astype(float).itertuples(index=False, name=None)
    return Readings(dict(zip(keys, values, strict=True)))
