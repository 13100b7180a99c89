"""Named numbers that a claim can be judged by: of a run, of one seed's levels, or of two arms of one seed."""

from analysis.measures import mechanism, runs, scaling, spikes, sweeps  # noqa: F401  (they register their measures)
from analysis.measures.registry import (
    MEASURES,
    Measure,
    Part,
    Quantity,
    parts_by_seed,
    read_quantity,
    run_parts,
)

__all__ = ["MEASURES", "Measure", "Part", "Quantity", "parts_by_seed", "read_quantity", "run_parts"]
