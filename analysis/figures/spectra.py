"""Any recorded columns over steps, a panel per column or per family: spectra by role, the experts' balance."""

from analysis.drawing.canvas import panel_columns, panel_place
from analysis.drawing.layout import (
    BOLD,
    TRACE_COLUMNS,
    columns_of,
    legend_above,
    line_per_level,
    only_outer_labels,
    share_near_limits,
    small_multiples,
)
from analysis.drawing.lines import hide_steps_labels
from analysis.drawing.panels import expand_columns, plot_column
from analysis.figures.registry import Drawing, figure
from analysis.frames import Frames


@figure("spectra")
def draw_spectra(
    frames: Frames,
    columns: list[str] | None = None,
    title: str = "",
    x: str = "",
    over: str = "",
    window: int = 1,
) -> Drawing:
    """A panel per recorded column; "svd_entropy/*" is a panel per role, or with `over` (mean, max, min) one for all."""
    wanted = columns or ["svd_entropy/*"]
    steps = line_per_level(frames, x).steps
    if over:
        for name in wanted:
            family = expand_columns(steps, [name])
            steps = steps.assign(**{name.removesuffix("/*"): steps[family].agg(over, axis="columns")})
        names = [name.removesuffix("/*") for name in wanted]
    else:
        names = expand_columns(steps, wanted)
    families = {name.partition("/")[0] for name in names}
    fig, axes = small_multiples(len(names), 1.75)
    for ax, column in zip(axes, names, strict=True):
        role = column if over else column.rpartition("/")[2]
        plot_column(ax, steps, column, window, title=_heading(role))
    if len(families) == 1 and len(names) > 1 and not over:
        share_near_limits(axes)
        only_outer_labels(axes)
    for ax in axes:
        place = panel_place(ax)
        if place.rowspan.stop * panel_columns(ax) + place.colspan.start < len(axes):
            hide_steps_labels(ax)
    if title:
        fig.suptitle(title)
    legend_above(fig, axes[:1])
    note = f"At each step the {over} over all layers." if over else ""
    note += f" Centred mean of {window} steps." if window > 1 else ""
    note += f" {BOLD}"
    return fig, columns_of(steps, [*TRACE_COLUMNS, *names]).dropna(subset=names, how="all"), note.strip()


def _heading(role: str) -> str:
    words = role.replace("_", " ").replace("/", " ")
    return "MLP" if words == "mlp" else words[:1].upper() + words[1:]
