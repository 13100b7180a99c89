"""One pure function per figure: it draws a tidy table on given axes and reads nothing else."""

from analysis.figures.arms import plot_differences, plot_logit_dots
from analysis.figures.columns import plot_column
from analysis.figures.crossing import plot_crossing
from analysis.figures.extrapolation import plot_extrapolation
from analysis.figures.heads import plot_heads
from analysis.figures.levels import plot_levels
from analysis.figures.loss import plot_loss
from analysis.figures.max_logit import plot_max_logit
from analysis.figures.mechanism import plot_mechanism
from analysis.figures.polynomials import plot_polynomials
from analysis.figures.scaling import plot_scaling
from analysis.figures.sensitivity import plot_sensitivity
from analysis.figures.spike_events import plot_spike_events
from analysis.figures.spike_vs_stable import plot_spike_vs_stable
from analysis.figures.switch import plot_switch
from analysis.figures.to_target import plot_to_target

__all__ = [
    "plot_column",
    "plot_crossing",
    "plot_differences",
    "plot_extrapolation",
    "plot_heads",
    "plot_levels",
    "plot_logit_dots",
    "plot_loss",
    "plot_max_logit",
    "plot_mechanism",
    "plot_polynomials",
    "plot_scaling",
    "plot_sensitivity",
    "plot_spike_events",
    "plot_spike_vs_stable",
    "plot_switch",
    "plot_to_target",
]
