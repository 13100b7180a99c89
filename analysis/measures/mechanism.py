"""Measures of why logits grow and how spectra differ, from the columns that trainer.spectra_every records."""

import math

import numpy as np

from analysis.measures.registry import Part, measure
from analysis.measures.runs import after_warmup, end
from muonlab.errors import MuonlabError

NORMS = ("argmax_query_norm", "argmax_key_norm")
COSINE = "argmax_cosine"


@measure("run", "", "Wortsman et al. (arXiv 2309.14322), App. E.1, against Kimi K2, App. E")
def norm_share(part: Part) -> float:
    """The share of log S_max's growth that the norms of query and key make up; the cosine makes up the rest.

    S = |q| |k| cos(q, k) / sqrt(d) at the largest logit, so d log S = d log|q| + d log|k| + d log cos, from the first
    reading after warm-up to the last. NaN where the logit grew by less than a tenth, because there is little growth to
    divide, and where the run ended within its warm-up.
    """
    traces = [np.log(part.trace(name).clip(lower=1e-30)) for name in (*NORMS, COSINE)]
    settled = [after_warmup(part, trace) for trace in traces]
    if any(trace.empty for trace in settled):
        return math.nan
    growth = [float(trace.iloc[-1] - trace.iloc[0]) for trace in settled]
    return sum(growth[:2]) / sum(growth) if sum(growth) > math.log(1.1) else math.nan


@measure("pair", "", "Moonlight (arXiv 2502.16982), Fig 4: over 90 % of the matrices")
def higher_share(arm: Part, baseline: Part, column: str = "matrix_svd_entropy/*") -> float:
    """The fraction of the matching columns (one per matrix) that end higher in the arm than in the baseline."""
    names = [c for c in arm.steps.columns if c.startswith(column.rstrip("*")) and c in baseline.steps]
    names = [c for c in names if arm.steps[c].notna().any() and baseline.steps[c].notna().any()]
    if not names:
        raise MuonlabError(f"no column {column} was recorded in both arms; set trainer.spectra_every")
    return float(np.mean([end(arm, name) > end(baseline, name) for name in names]))
