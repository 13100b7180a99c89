"""One question, one file of experiments/: its runs, its verdicts, its figures (python -m muonlab.experiment NAME)."""

from muonlab.experiment.cells import Cell, cells
from muonlab.experiment.spec import at_scale, check_spec, load_experiment

__all__ = ["Cell", "at_scale", "cells", "check_spec", "load_experiment"]
