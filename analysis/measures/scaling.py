"""Power laws of the loss over compute, and how much compute one optimizer needs to match another."""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from analysis.inference import CONFIDENCE, Interval
from analysis.measures.registry import Part, measure
from muonlab.errors import MuonlabError

Numbers = TypeVar("Numbers", float, np.ndarray)
Points = tuple[np.ndarray, np.ndarray]  # compute in FLOPs and loss, by size


@dataclass(frozen=True)
class PowerLaw:
    """loss = coefficient * compute^-exponent, fitted over compute in [low, high]."""

    coefficient: float
    exponent: float
    low: float
    high: float

    def loss(self, compute: Numbers) -> Numbers:
        """The loss at a compute, or at each of several."""
        return self.coefficient * compute**-self.exponent

    def compute(self, loss: float) -> float:
        """The compute at which the law has this loss: (coefficient / loss)^(1 / exponent)."""
        return (self.coefficient / loss) ** (1 / self.exponent)


def fit_power_law(compute: np.ndarray, loss: np.ndarray) -> PowerLaw:
    """Least squares of log loss over log compute (Moonlight, arXiv 2502.16982, Fig 1a: 2.506 C^-0.052 for Muon).

    Raises MuonlabError for fewer than two different computes or losses that are not positive.
    """
    if len(np.unique(compute)) < 2 or not (np.asarray(loss) > 0).all():
        raise MuonlabError("a power law needs two or more computes and positive losses")
    slope, intercept = fit_lines(np.log(compute), np.log(loss))
    return PowerLaw(math.exp(intercept), -float(slope), float(np.min(compute)), float(np.max(compute)))


def fit_lines(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts (...) of the least-squares lines of `y` (..., n) over `x` (n,)."""
    centred, means = x - x.mean(), y.mean(axis=-1)
    slopes = (centred * (y - means[..., None])).sum(axis=-1) / (centred**2).sum()
    return slopes, means - slopes * x.mean()


def compute_at_equal_loss(arm: PowerLaw, baseline: PowerLaw, compute: float) -> float:
    """C_arm(L) / C_baseline(L) at L, the baseline's loss at `compute`: below 1 where the arm needs less."""
    return arm.compute(baseline.loss(compute)) / compute


def resampled_means(losses: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Mean losses (resamples, sizes) over seeds drawn anew at each size; losses: (sizes, seeds)."""
    seeds = rng.integers(losses.shape[1], size=(resamples, *losses.shape))
    return np.take_along_axis(losses[None], seeds, axis=2).mean(axis=2)


def bootstrap_ratio(
    arm: np.ndarray,
    baseline: np.ndarray,
    compute: np.ndarray,
    at: float,
    resamples: int = 2000,
) -> Interval:
    """`compute_at_equal_loss` of the mean losses with a percentile interval over seeds, drawn anew at each size.

    arm, baseline: losses (sizes, seeds). compute: (sizes,), the same for both. at: the compute of the comparison.
    """
    rng = np.random.default_rng(0)
    means = [resampled_means(losses, resamples, rng) for losses in (arm, baseline)]
    ratios = [_ratio(a, b, compute, at) for a, b in zip(*means, strict=True)]
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    estimate = _ratio(arm.mean(1), baseline.mean(1), compute, at)
    return Interval(estimate, float(low), float(high), arm.shape[1])


def _ratio(arm: np.ndarray, baseline: np.ndarray, compute: np.ndarray, at: float) -> float:
    return compute_at_equal_loss(fit_power_law(compute, arm), fit_power_law(compute, baseline), at)


@measure("pair", "x", "Moonlight (arXiv 2502.16982), Fig 1a: 0.519")
def compute_ratio(arm: Part, baseline: Part, at: float | None = None, column: str = "loss") -> float:
    """The share of the baseline's compute at which the arm has its loss, by two power laws over the levels (sizes).

    at: the baseline's compute in FLOPs at which they are compared; None: its largest, as in the paper's figure.
    """
    law, reference = (fit_power_law(*_points(part, column)) for part in (arm, baseline))
    return compute_at_equal_loss(law, reference, at or reference.high)


@measure("pair", "", "Moonlight's fits, by arithmetic: 0.44 at 399M, 0.50 at 1.5B")
def compute_ratio_trend(arm: Part, baseline: Part, column: str = "loss") -> float:
    """The exponent of `compute_ratio` in the baseline's compute: above 0 where the saving shrinks with scale.

    From arm.compute(baseline.loss(C)) / C, which is C^(b_baseline / b_arm - 1) times a constant.
    """
    law, reference = (fit_power_law(*_points(part, column)) for part in (arm, baseline))
    return reference.exponent / law.exponent - 1


@measure("pair", "x", "muonlab: no law is assumed")
def interpolated_ratio(arm: Part, baseline: Part, column: str = "loss") -> float:
    """`compute_ratio` at the baseline's largest compute, the arm's loss being interpolated between its sizes."""
    _, ratios = interpolated_ratios(_points(arm, column), _points(baseline, column))
    return float(ratios[-1])


@measure("pair", "", "muonlab: no law is assumed")
def interpolated_ratio_trend(arm: Part, baseline: Part, column: str = "loss") -> float:
    """Slope of the logarithm of the ratio of compute over that of the baseline's compute, at every size of the baseline
    whose loss lies within the arm's: above 0 where the saving shrinks with scale; NaN for fewer than two such sizes."""
    compute, ratios = interpolated_ratios(_points(arm, column), _points(baseline, column))
    return float(fit_lines(np.log(compute), np.log(ratios))[0]) if len(compute) > 1 else math.nan


def interpolated_ratios(arm: Points, baseline: Points) -> tuple[np.ndarray, np.ndarray]:
    """The baseline's computes whose loss L lies within the arm's, and C_arm(L) / C_baseline(L) there.

    log C_arm is linear in log L between neighbouring sizes. arm, baseline: compute and loss by size. Raises
    MuonlabError where the arm's loss does not fall with every size, or none of the baseline's lies within.
    """
    (compute, loss), (baseline_compute, baseline_loss) = (
        (c[np.argsort(c)], values[np.argsort(c)]) for c, values in (arm, baseline)
    )
    if (np.diff(loss) >= 0).any():
        raise MuonlabError(
            "compute at a loss cannot be read off where the loss does not fall with every size"
        )
    within = (baseline_loss <= loss.max()) & (baseline_loss >= loss.min())
    if not within.any():
        raise MuonlabError("none of the baseline's losses lies within the arm's")
    equal = np.interp(np.log(baseline_loss[within]), np.log(loss[::-1]), np.log(compute[::-1]))
    return baseline_compute[within], np.exp(equal) / baseline_compute[within]


def _points(part: Part, column: str) -> Points:
    runs = part.runs.dropna(subset=[column])
    return runs["flops"].to_numpy(float), runs[column].to_numpy(float)
