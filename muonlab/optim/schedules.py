"""The published Newton-Schulz schedules by name, and what each does: band, sign, slope and cost.

A schedule is a list of rows (a, b, c), one per step, with the normalisation that they were fitted for (`Schedule`). The
numbers are the published ones; each entry names its source.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from muonlab.errors import MuonlabError, unknown_name
from muonlab.optim.schedule_design import Row, Schedule, design_schedule

Coefficients = str | Schedule | Sequence[float] | Sequence[Sequence[float]]

_JORDAN: Row = (3.4445, -4.7750, 2.0315)

# Polar Express: Amsel, Persson, Musco, Gower, arXiv 2505.16932, degree 5, fitted on [1e-3, 1].
_POLAR_EXPRESS: tuple[Row, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def _damped(rows: Sequence[Row], safety: float) -> tuple[Row, ...]:
    """p(x / safety) in place of p(x): rounding may push a singular value above 1 by that factor."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows)


SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule(
            "jordan",
            (_JORDAN,) * 5,
            "Keller Jordan, Muon (2024): one triple with the steepest slope at 0 that keeps [0.7, 1.2]",
        ),
        Schedule(
            "you",
            (
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            "Jiacheng You (2025), five tuned rows; default of Emerging-Optimizers and Megatron",
        ),
        Schedule(
            "you6",
            tuple(
                (a / 1024, b / 1024, c / 1024)
                for a, b, c in (
                    (3955, -8306, 5008),
                    (3735, -6681, 3463),
                    (3799, -6499, 3211),
                    (4019, -6385, 2906),
                    (2677, -3029, 1162),
                    (2172, -1833, 682),
                )
            ),
            "Jiacheng You (2025), six rows in units of 1/1024; kexue.fm/archives/10922",
        ),
        Schedule(
            "polar_express",
            _POLAR_EXPRESS,
            "Amsel et al., arXiv 2505.16932, undamped: meant for exact arithmetic",
            usual_steps=5,
        ),
        Schedule(
            "polar_express_1.01",
            (*_damped(_POLAR_EXPRESS[:-1], 1.01), _POLAR_EXPRESS[-1]),
            "arXiv 2505.16932, every row but the last damped by 1.01; Emerging-Optimizers, HeavyBall",
            usual_steps=5,
        ),
        Schedule(
            "polar_express_1.02",
            (
                (8.156554524902461, -22.48329292557795, 15.878769915207462),
                (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
            ),
            "arXiv 2505.16932, safety 1.02, cushion 2, norm times 1.02; modded-nanogpt, nanochat, dion",
            margin=1.02,
        ),
        Schedule(
            "polar_express_1.05",
            _damped(_POLAR_EXPRESS[:5], 1.05),
            "arXiv 2505.16932, first five rows damped by 1.05; gram-newton-schulz",
        ),
        Schedule(
            "cans",
            (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            "Grishina, Smirnov, Rakhuba, CANS, arXiv 2506.10935, as tabled in Emerging-Optimizers",
        ),
        Schedule(
            "aol",
            (
                (4.0098, -7.0585, 2.4635),
                (3.4585, -5.5479, 2.5959),
                (2.7573, -3.2939, 1.4254),
                (2.7215, -3.0494, 1.3169),
            ),
            "Boissin et al., Turbo-Muon, arXiv 2512.04632, rows as tabled in Emerging-Optimizers",
            # These rows turn negative above 0.8837, and AOL leaves a rank-one matrix at exactly 1: without
            # the margin its update is reversed.
            margin=1.18,
            row_rescaling=True,
        ),
        Schedule(
            "aol_dion",
            (
                (4.6051, -9.6552, 5.6769),
                (4.7505, -6.0861, 2.1790),
                (2.7763, -2.3190, 0.5523),
                (2.4231, -2.2861, 0.8193),
            ),
            "arXiv 2512.04632, rows as tabled in dion",
            row_rescaling=True,
        ),
        Schedule(
            "deepseek",
            (*(_JORDAN,) * 8, *((2.0, -1.5, 0.5),) * 2),
            "DeepSeek-V4 hybrid: eight Jordan steps, then two that converge to 1; Emerging-Optimizers",
        ),
        Schedule(
            "cubic",
            (
                (3.3656576, -3.3420992, 0.0),
                (2.5744352, -1.4957376, 0.0),
                (2.5368962, -1.4312570, 0.0),
                (2.4418906, -1.2764040, 0.0),
                (2.2230472, -0.9630650, 0.0),
            ),
            "arXiv 2606.00371, as tabled in Emerging-Optimizers: c = 0 saves the square of the Gram matrix",
        ),
        Schedule("svd", (), "the polar factor U Vᵀ from a singular value decomposition"),
    )
}


MINIMAX = "minimax"


def list_schedules() -> list[str]:
    """Names that `resolve_schedule` accepts, sorted; "minimax" may carry its floor, "minimax:0.01"."""
    return sorted([*SCHEDULES, MINIMAX])


def resolve_schedule(schedule: Coefficients, steps: int | None = None) -> Schedule:
    """The rows that will run: exactly `steps` of them.

    `schedule` is a name, a `Schedule`, one triple (a, b, c), or a list of triples. `steps` None runs the
    usual number (all rows unless the table says otherwise; one triple: five times). Fewer steps than rows
    run the first rows; more repeat the last row, as Polar Express does once it has converged. `svd` ignores
    `steps`. "minimax:0.01" fits `steps` rows (None: 5) for the spectral floor 0.01 with
    `design_schedule`; plain "minimax" takes the floor 0.001.

    Raises MuonlabError for an unknown name, rows that are not finite triples, and steps below 1.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise MuonlabError(
            f"Newton-Schulz steps must be an integer of at least 1, or None for the usual, not {steps!r}"
        )
    if isinstance(schedule, str):
        if schedule.partition(":")[0] == MINIMAX:
            return _designed(schedule, steps or 5)
        if schedule not in SCHEDULES:
            raise unknown_name("Newton-Schulz schedule", schedule, list_schedules())
        table = SCHEDULES[schedule]
    elif isinstance(schedule, Schedule):
        table = schedule
    else:
        table = _from_hand(schedule)
    steps = steps or table.usual_steps or table.steps
    if table.exact or steps == table.steps:
        return table
    rows = table.rows[:steps] + table.rows[-1:] * (steps - table.steps)
    return replace(table, rows=rows, usual_steps=0)


def _designed(name: str, steps: int) -> Schedule:
    _, separator, floor = name.partition(":")
    try:
        return design_schedule(steps, float(floor) if separator else 1e-3)
    except ValueError:
        raise MuonlabError(f"a minimax schedule is named 'minimax' or 'minimax:0.01', not {name!r}") from None


def _from_hand(coefficients: Sequence[float] | Sequence[Sequence[float]]) -> Schedule:
    # one triple is a fixed point iteration, run five times like Jordan's
    try:
        entries: list[Any] = list(coefficients)
        table = [entries] * 5 if entries and isinstance(entries[0], Real) else entries
        rows = tuple((float(a), float(b), float(c)) for a, b, c in table)
    except (TypeError, ValueError):
        rows = ()
    if not rows or not all(math.isfinite(value) for row in rows for value in row):
        raise MuonlabError(
            "Newton-Schulz coefficients must be a schedule name, one triple (a, b, c) or a list of finite "
            f"triples, not {coefficients!r}"
        )
    return Schedule("custom", rows, "coefficients passed as numbers")


@dataclass(frozen=True)
class ScheduleReport:
    """Figures of one schedule; `str()` prints them as a paragraph."""

    schedule: Schedule
    floor: float
    band: tuple[float, float]
    keeps_sign: bool
    slope: float
    flops: int
    shape: tuple[int, int]

    def __str__(self) -> str:
        schedule = self.schedule
        (low, high), (rows, cols) = self.band, self.shape
        sign = "never changes" if self.keeps_sign else "CHANGES: some updates are reversed"
        lines = [
            f"{schedule.name}: {schedule.steps} steps",
            f"  source          {schedule.source}",
            f"  normalisation   {_normalisation(schedule)}",
            f"  band            [{low:.4f}, {high:.4f}] on singular values [{self.floor:g}, 1]",
            f"  sign on (0, 1]  {sign}",
            f"  slope at 0      {self.slope:.4g}",
            f"  cost            {self.flops / 1e6:.1f} MFLOP for {rows} x {cols}, plain form",
        ]
        return "\n".join(lines)


def describe_schedule(
    schedule: Coefficients,
    steps: int | None = None,
    floor: float = 0.01,
    shape: tuple[int, int] = (768, 768),
) -> ScheduleReport:
    """Band over singular values [floor, 1], sign check, slope at zero, and FLOPs at `shape` (rows, cols).

    Everything is computed from the rows; nothing is quoted. Raises MuonlabError for an unknown name or a
    floor outside (0, 1].
    """
    schedule = resolve_schedule(schedule, steps)
    slope = math.inf if schedule.exact else math.prod(a for a, _, _ in schedule.rows) / schedule.margin
    return ScheduleReport(
        schedule, floor, schedule.band(floor), schedule.keeps_sign(), slope, schedule.flops(*shape), shape
    )


def _normalisation(schedule: Schedule) -> str:
    unit = "AOL row rescaling" if schedule.row_rescaling else "Frobenius norm"
    return unit if schedule.margin == 1 else f"{unit}, divided by {schedule.margin:g}"
