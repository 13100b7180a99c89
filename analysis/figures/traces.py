"""Probe loss and max logit side by side."""

from analysis.drawing.canvas import PAGE, new_figure
from analysis.drawing.layout import BOLD, TRACE_COLUMNS, columns_of, legend_above, line_per_level
from analysis.drawing.lines import draw_rate_axis
from analysis.drawing.panels import plot_loss, plot_max_logit
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames


@figure("traces")
def draw_traces(
    frames: Frames, title: str = "", tau: float | None = None, x: str = "", rates: bool = False
) -> Drawing:
    """Probe loss and max logit side by side; with `rates` the learning rate is a second axis above, for a ramp."""
    steps = line_per_level(frames, x).steps
    fig, axes = new_figure(1, 2, width=PAGE, height=2.5)
    plot_loss(axes[0, 0], steps, title=title or "Held-out loss")
    plot_max_logit(axes[0, 1], steps, tau, title="Largest attention logit")
    for ax in axes[0] if rates else ():
        draw_rate_axis(ax, steps)
    legend_above(fig, axes[0, :1])
    note = f"Left: loss on one fixed held-out batch. Right: largest logit of all layers and heads. {BOLD}"
    return fig, columns_of(steps, [*TRACE_COLUMNS, "probe_loss", "max_logit"]), note
