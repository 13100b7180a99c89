"""Named numbers that a claim can be judged by: of a run, of one seed's levels, or of two arms of one seed."""

from analysis.measures import mechanism, runs, scaling, sweeps  # noqa: F401  (they register their measures)
from analysis.measures.registry import MEASURES, Measure, Part, check_measure, measured, parts_by_seed

__all__ = ["MEASURES", "Measure", "Part", "check_measure", "measured", "parts_by_seed"]
