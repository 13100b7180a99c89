"""Every column by name: what it means, its unit, its axis, and how its readings are thinned out. One table.

A column of `Frames.runs` is one function below with `@summary`; a column of `Frames.steps` is one line of `RECORDED`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from muonlab.record import Run
from muonlab.record.spikes import SCORED

END_SHARE = 0.05  # "at the end" is the median over this last share of a run's steps
LOST = ("diverged", "out-of-memory")  # statuses of a run that counts as having learnt nothing
NATS = "\n(nats per token)"


@dataclass(frozen=True)
class Column:
    """label: of its axis. log: the axis is logarithmic, for what spans decades and is never zero. thinned: what
    `results/` keeps of the readings of several consecutive steps: their "last", "max", "min", "mean" or "sum"."""

    label: str
    log: bool = False
    thinned: str = "last"


# Columns of `Frames.steps`, and families of them: "svd_entropy" is the axis of "svd_entropy/query" too.
RECORDED = {
    "train_loss": Column(f"training loss{NATS}", thinned="mean"),
    "probe_loss": Column(f"probe-batch loss{NATS}", thinned="mean"),
    "val_loss": Column(f"validation loss{NATS}", thinned="mean"),
    "max_logit": Column("max logit (scaled q·k)", log=True, thinned="max"),
    "probe_max_logit": Column("max logit of the probe batch", log=True),
    "entropy": Column("attention entropy (nats)", thinned="mean"),
    "one_hot": Column("share of one-hot attention rows", thinned="mean"),
    "gamma": Column("smallest clip factor (gamma)", thinned="min"),
    "grad_norm": Column("gradient norm", log=True, thinned="max"),
    "log_partition": Column("log of the softmax's sum (nats)"),
    "optimizer_bytes": Column("state of the optimizer (bytes)", log=True),
    "second_moment_lag": Column("second moment over gradient (RMS)", log=True, thinned="max"),
    "loss_spikes": Column("loss spikes", thinned="sum"),
    "grad_spikes": Column("gradient spikes", thinned="sum"),
    "clipped": Column("share of steps that clip"),
    "tokens": Column("tokens", log=True),
    "flops": Column("FLOPs", log=True),
    "seconds": Column("seconds", log=True),
    "svd_entropy": Column("SVD entropy of the weights"),
    "update_svd_entropy": Column("SVD entropy of the updates"),
    "sigma_max": Column("largest singular value", log=True),
    "stable_rank": Column("stable rank of the weights"),
    "overlap": Column("overlap of update and weight"),
    "frobenius": Column("Frobenius norm of the weights"),
    "weight_rms": Column("weight RMS"),
    "update_rms": Column("update RMS"),
    "balance/violation": Column("load violation\n(max / mean - 1)"),
    "router/entropy": Column("router entropy (nats)"),
    "router/max_logit": Column("largest router logit", log=True),
}


@dataclass(frozen=True)
class Heads:
    """The heads of a run: their extremes by step, their rows in `Frames.heads`, and how much the clip scaled them."""

    by_step: pd.DataFrame
    rows: pd.DataFrame
    clipped_share: float
    clipped_heads: float


@dataclass(frozen=True)
class RunTables:
    """The input of a summary: the run's record, its steps with the columns that the heads add, and its heads."""

    run: Run
    steps: pd.DataFrame
    heads: Heads

    def last(self, column: str) -> float:
        """The last recorded value of a column that need not be recorded every step; NaN where there is none."""
        return last_reading(self.steps.get(column))

    def final(self, metric: str) -> float:
        """A metric of a finished run; NaN for one that diverged or was cut short."""
        if self.run.status != "finished":
            return math.nan
        value = self.run.metrics.get(metric, self.last(metric))
        return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Summary:
    """A registered column of `Frames.runs`: `function` gives its value in `unit` ("" for a pure number)."""

    function: Callable[[RunTables], float]
    unit: str
    column: Column


SUMMARIES: dict[str, Summary] = {}


def summary(
    unit: str, label: str = "", log: bool = False
) -> Callable[[Callable[[RunTables], float]], Callable[[RunTables], float]]:
    """Register the function below as a column of `Frames.runs`. label: of its axis; "" takes that of the recorded
    column of the same name, or else the name."""

    def register(function: Callable[[RunTables], float]) -> Callable[[RunTables], float]:
        name = function.__name__
        usual = RECORDED.get(name, Column(name.replace("_", " ")))
        SUMMARIES[name] = Summary(function, unit, Column(label, log) if label else usual)
        return function

    return register


@summary("steps")
def num_steps(run: RunTables) -> float:
    """Steps that were recorded."""
    return len(run.steps)


@summary("steps")
def warmup_steps(run: RunTables) -> float:
    """Steps before the learning rate first has its largest value; NaN where it was not recorded."""
    return peak_step(run.steps["step"], run.steps["lr"])


@summary("tokens")
def tokens(run: RunTables) -> float:
    """Training tokens."""
    return run.last("tokens")


@summary("FLOPs")
def flops(run: RunTables) -> float:
    """FLOPs of the model, without the optimizer's."""
    return run.last("flops")


@summary("s")
def seconds(run: RunTables) -> float:
    """Wall-clock seconds of training."""
    return run.last("seconds")


@summary("nats")
def initial_loss(run: RunTables) -> float:
    """The training loss of the first step."""
    return float(run.steps["train_loss"].iloc[0]) if len(run.steps) else math.nan


@summary("nats")
def val_loss(run: RunTables) -> float:
    """The final validation loss of a finished run, else NaN."""
    return run.final("val_loss")


@summary("nats")
def probe_loss(run: RunTables) -> float:
    """The final loss on the fixed probe batch of a finished run, else NaN."""
    return run.final("probe_loss")


@summary("bits per byte", "validation loss\n(bits per byte)")
def val_bits_per_byte(run: RunTables) -> float:
    """The final validation loss of a finished run per byte of text, which is comparable across tokenizers."""
    return run.final("val_bits_per_byte")


@summary("nats", f"validation loss{NATS}")
def loss(run: RunTables) -> float:
    """The loss that the run counts with: see `settled_loss`."""
    return settled_loss(val_loss(run), initial_loss(run), run.run.status)


@summary("")
def max_logit(run: RunTables) -> float:
    """The largest logit of all steps, layers and heads."""
    return float(run.steps["max_logit"].max())


@summary("", "max logit at the end", log=True)
def end_max_logit(run: RunTables) -> float:
    """The largest logit of all layers and heads, at the end."""
    return at_end(run.steps["max_logit"])


@summary("nats", "attention entropy\nat the end (nats)")
def end_entropy(run: RunTables) -> float:
    """The mean attention entropy of all layers and heads, at the end."""
    return at_end(run.steps["entropy"])


@summary("%", "loss spike score (%)")
def spike_score(run: RunTables) -> float:
    """OLMo 2's spike score of the training loss, upward only: percent of the steps."""
    value = run.run.spike_scores.get("olmo2_upward/train_loss")
    return math.nan if value is None else float(value)


@summary("", "share of head-steps clipped")
def clipped_share(run: RunTables) -> float:
    """The share of the (step, head) pairs that the clip scaled down."""
    return run.heads.clipped_share


@summary("", "share of heads ever clipped")
def clipped_heads(run: RunTables) -> float:
    """The share of the heads that the clip ever scaled down."""
    return run.heads.clipped_heads


# The columns of `Frames.runs` that a claim can be about, with their units.
METRICS = {name: each.unit for name, each in SUMMARIES.items()}
METRICS |= {f"spikes/{name}/{series}": "%" for name, columns in SCORED.items() for series in columns}
METRICS |= {f"spikes/olmo2_upward/{series}": "%" for series in SCORED["olmo2"]}
COLUMNS = RECORDED | {name: each.column for name, each in SUMMARIES.items()}
# Measures that figures draw on a logarithmic axis.
COLUMNS |= {"steps_to_target": Column("steps to target", log=True)}


def axis_label(column: str) -> str:
    """The label of a column's axis: its own, that of its family ("svd_entropy" of "svd_entropy/query"), or its name."""
    parts = column.split("/")
    for length in range(len(parts), 0, -1):
        if known := COLUMNS.get("/".join(parts[:length])):
            return known.label
    return column.replace("_", " ")


def is_logarithmic(column: str) -> bool:
    """Whether a column, one of its family, or a measure of it ("sigma_max/mlp (end)") has a logarithmic axis."""
    return any(column.startswith(name) for name, known in COLUMNS.items() if known.log)


def settled_loss(val_loss: float, initial_loss: float, status: str) -> float:
    """The loss that a run counts with: min(val_loss, initial_loss), and initial_loss where it diverged or was too
    large for its machine's memory.

    So a diverged seed stays in every mean and rank at the price of having learnt nothing, as in the
    learning-rate sensitivity of Wortsman et al. (arXiv 2309.14322, section 2). NaN for runs that were cut
    short for other reasons.
    """
    if status in LOST or val_loss == math.inf:
        return initial_loss
    return math.nan if math.isnan(val_loss) else min(val_loss, initial_loss)


def peak_step(steps: pd.Series, rates: pd.Series) -> float:
    """The step at which the learning rate first has its largest value, where the warm-up ends; NaN where no rate was
    recorded."""
    return float(steps.to_numpy()[rates.argmax()]) if rates.notna().any() else math.nan


def last_reading(readings: pd.Series | None) -> float:
    """The last recorded value of a column that need not be recorded every step; NaN where there is none."""
    recorded = [] if readings is None else readings.dropna().tolist()
    return float(recorded[-1]) if recorded else math.nan


def at_end(readings: pd.Series) -> float:
    """Median of the readings in the last 5 % of the rows, or the last reading where those have none; NaN for none."""
    tail = readings.tail(max(1, round(END_SHARE * len(readings)))).dropna()
    return float(tail.median()) if len(tail) else last_reading(readings)
