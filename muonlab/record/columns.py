"""The columns of a run's traces that have a place of their own in its frames or among MLflow's charts.

Any other scalar that is recorded is a column too: sorted by name behind these, and charted under `optim/`, thinned. A
quantity per layer and head is one entry of HEADS, and whatever records it returns it under that name.
"""

from dataclasses import dataclass
from typing import Literal

Reduction = Literal["max", "mean", "min"]
Thinning = Literal["max", "min", "last"]


@dataclass(frozen=True)
class Chart:
    """Where MLflow shows a column.

    key: the name of its chart.
    every_step: chart every step, since a spike lasts one; otherwise the column is thinned, because a point costs 0.1 ms
        (SQLite) to 0.3 ms (a server).
    """

    key: str
    every_step: bool = False


@dataclass(frozen=True)
class HeadColumn:
    """A quantity that is recorded per layer and head.

    column: its name in the trace `max_logits`.
    chart: None: it only qualifies another column; it is neither charted nor reduced, and `results/` leaves it out.
    reduction: over the heads of a layer for its chart, and over all layers and heads for `Frames.steps` of analysis.
    by_layer: one chart per layer; otherwise one for all.
    thinned: what a row that covers several consecutive steps keeps of a head's readings.
    """

    column: str
    chart: Chart | None = None
    reduction: Reduction = "max"
    by_layer: bool = True
    thinned: Thinning = "last"


SCALARS = {
    "tokens": Chart("progress/tokens"),
    "flops": Chart("progress/flops"),
    "seconds": Chart("progress/seconds"),
    "train_loss": Chart("loss/train", every_step=True),
    "lr": Chart("optim/lr"),
    "grad_norm": Chart("optim/grad_norm", every_step=True),
    "probe_loss": Chart("loss/probe", every_step=True),
    "val_loss": Chart("loss/val", every_step=True),
}
"""Columns that every `steps` frame has, first and in this order, measured or not."""

HEADS = {
    "max_logit": HeadColumn("value", Chart("max_logit", every_step=True), thinned="max"),
    "max_logit_abs": HeadColumn("value_abs", thinned="max"),
    "exact": HeadColumn("exact", thinned="min"),
    "gamma": HeadColumn(
        "gamma", Chart("qk_clip/gamma", every_step=True), "min", by_layer=False, thinned="min"
    ),
    "entropy": HeadColumn("entropy", Chart("softmax/entropy"), "mean"),
    "one_hot": HeadColumn("one_hot", Chart("softmax/one_hot"), "mean"),
}
"""Everything that may be recorded per layer and head. `exact` is bool: whether both values are the maxima themselves,
or both upper bounds; they are exact unless recorded otherwise."""

FAMILIES = {"balance": Chart("moe/balance"), "router": Chart("moe/router"), "experts": Chart("moe/experts")}
"""The charts of scalars with a name of several parts, by the first."""


def chart_of(name: str) -> Chart:
    """The chart of a column, by the part of its name before the first slash."""
    head = HEADS.get(name)
    return SCALARS.get(name) or (head and head.chart) or FAMILIES.get(name) or Chart(f"optim/{name}")
