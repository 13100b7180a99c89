"""What an axis says about a column of `Frames.runs` or `Frames.steps`, and whether it is logarithmic."""

LABELS = {
    "train_loss": "training loss\n(nats per token)",
    "probe_loss": "probe-batch loss\n(nats per token)",
    "val_loss": "validation loss\n(nats per token)",
    "loss": "validation loss\n(nats per token)",
    "val_bits_per_byte": "validation loss\n(bits per byte)",
    "max_logit": "max logit (scaled q·k)",
    "end_max_logit": "max logit at the end",
    "probe_max_logit": "max logit of the probe batch",
    "entropy": "attention entropy (nats)",
    "end_entropy": "attention entropy\nat the end (nats)",
    "grad_norm": "gradient norm",
    "gamma": "smallest clip factor (gamma)",
    "clipped_share": "share of head-steps clipped",
    "clipped_heads": "share of heads ever clipped",
    "clipped": "share of steps that clip",
    "spike_score": "loss spike score (%)",
    "tokens": "tokens",
    "flops": "FLOPs",
    "seconds": "seconds",
    "svd_entropy": "SVD entropy of the weights",
    "update_svd_entropy": "SVD entropy of the updates",
    "sigma_max": "largest singular value",
    "stable_rank": "stable rank of the weights",
    "overlap": "overlap of update and weight",
    "frobenius": "Frobenius norm of the weights",
    "weight_rms": "weight RMS",
    "update_rms": "update RMS",
    "balance/violation": "load violation\n(max / mean - 1)",
    "router/entropy": "router entropy (nats)",
    "router/max_logit": "largest router logit",
}
# Beginnings of names whose values span decades and are never zero.
LOGARITHMIC = (
    *("max_logit", "end_max_logit", "probe_max_logit", "router/max_logit", "grad_norm", "sigma_max"),
    *("tokens", "flops", "seconds", "steps_to"),
)
LOSSES = ("train_loss", "probe_loss", "val_loss", "loss", "val_bits_per_byte")


def axis_label(column: str) -> str:
    """The label of a column's axis: its own, that of its family ("svd_entropy" of "svd_entropy/query"), or its name."""
    parts = column.split("/")
    for length in range(len(parts), 0, -1):
        if label := LABELS.get("/".join(parts[:length])):
            return label
    return column.replace("_", " ")


def is_logarithmic(column: str) -> bool:
    """Whether a column is drawn on a logarithmic axis."""
    return column.startswith(LOGARITHMIC)
