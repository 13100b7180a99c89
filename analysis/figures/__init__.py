"""One pure function per figure: it draws a tidy table on given axes and reads nothing else."""

from analysis.figures.loss import plot_loss
from analysis.figures.lr_sensitivity import plot_lr_sensitivity
from analysis.figures.max_logit import plot_max_logit
from analysis.figures.polynomials import plot_polynomials
from analysis.figures.spike_vs_stable import plot_spike_vs_stable
from analysis.figures.switch import plot_switch

__all__ = [
    "plot_loss",
    "plot_lr_sensitivity",
    "plot_max_logit",
    "plot_polynomials",
    "plot_spike_vs_stable",
    "plot_switch",
]
