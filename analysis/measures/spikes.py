"""Spikes free of the batch: the loss of a step minus that of another arm on the same batch.

Two arms of one seed see the same batches. A batch that is hard for both leaves their difference alone, so a spike of
the difference is the arm's own, and a smaller one is found: `smallest_own_spike` says how small.
"""

import numpy as np
import pandas as pd

from analysis.measures.registry import Part, measure
from muonlab.record.spikes import spike_score, trailing_moments

WINDOW, SIGMAS = 50, 7.0  # of OLMo 2's score (arXiv 2501.00656), with a window for short runs


@measure("pair", "%", "muonlab: OLMo 2's spike score of the loss minus another arm's on the same batch")
def own_spike_score(arm: Part, baseline: Part, column: str = "train_loss") -> float:
    """The share (percent) of steps whose loss above the baseline's lies SIGMAS above the mean of the WINDOW steps
    before; NaN for runs too short to score."""
    return spike_score(own_loss(arm, baseline, column), "olmo2", upward_only=True, window=WINDOW)


@measure("pair", "nats", "muonlab: the power of a search that finds no spike")
def smallest_own_spike(arm: Part, baseline: Part, column: str = "train_loss") -> float:
    """The least height at which `own_spike_score` would have found a spike: the median over the run of SIGMAS standard
    deviations of the WINDOW steps before."""
    _, deviation = trailing_moments(own_loss(arm, baseline, column).to_numpy(float), WINDOW, ddof=0)
    return float(SIGMAS * np.nanmedian(deviation[WINDOW:]))


def own_loss(arm: Part, baseline: Part, column: str) -> pd.Series:
    """The arm's readings minus the baseline's, over the steps that both have."""
    ours, theirs = arm.trace(column), baseline.trace(column)
    shared = ours.index.intersection(theirs.index)
    return ours.loc[shared] - theirs.loc[shared]
