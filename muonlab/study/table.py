"""The live table of a study: its progress bar and, under it on a terminal, what is best, what runs and what failed."""

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

from tqdm.utils import disp_trim

from muonlab.errors import EnvironmentFault
from muonlab.progress import Progress
from muonlab.study.standing import BestRun, Fault, LiveRun, Standing, setting_text

# Seconds from one reading of the queue to the next, and the largest share of the time that may go into it.
EVERY, SHARE = 2.0, 0.02
# What a terminal understands: erase from the cursor to the end of the line, and of the screen; go up a line.
ERASE_LINE, ERASE_BELOW, UP = "\x1b[K", "\x1b[J", "\x1b[A"
# Rows of the terminal that the lines leave free: for the bar, the last printed line and a prompt.
FREE = 3
INDENT, GAP = "  ", "  "


class Table(Progress):
    """The bar of `total_steps` steps in `total_jobs` runs and, under it, `table_lines` in the size that the terminal
    has now.

    All of it is drawn in one write, so lines that Progress.write prints appear above it and never within it. Without a
    terminal, or on one that cannot move its cursor (TERM=dumb), it is the bar alone, and `read` is never called.
    """

    def __init__(self, title: str, total_jobs: int, total_steps: int, read: Callable[[], Standing]):
        terminal = sys.stderr.isatty()
        self.live = terminal and os.environ.get("TERM", "dumb") != "dumb"
        self.total_jobs, self._read = total_jobs, read
        self._standing, self._runs = Standing(), list[LiveRun]()
        super().__init__(
            total=total_steps,
            desc=title,
            unit="step",
            mininterval=0.5 if terminal else 15,
            dynamic_ncols=terminal,
            smoothing=0.05,
        )
        self._due = time.monotonic()

    def show(self, steps: int, ended: int, runs: Sequence[LiveRun]) -> None:
        """Show that so many steps and runs are done and which runs are under way; drawn anew when it is due."""
        self._runs = list(runs)
        if self.live and time.monotonic() >= self._due:
            began = time.monotonic()
            with suppress(EnvironmentFault):  # the next reading may succeed; runs do not depend on it
                self._standing = self._read()
            now = time.monotonic()
            self._due = now + max(EVERY, (now - began) / SHARE)
        self.set_postfix_str(f"{ended}/{self.total_jobs} runs", refresh=False)
        self.update(steps - self.n)

    def fold(self) -> None:
        """Remove the lines under the bar."""
        self._standing, self._runs = Standing(), []
        self.refresh()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw bar and lines, and leave the cursor at the start of the bar, where an echoed ^C does no harm."""
        if not self.live:
            super().display(msg, pos)
            return
        width, height = os.get_terminal_size(self.fp.fileno())
        # A pseudo-terminal that nobody has given a size has 0 columns and 0 rows.
        lines = table_lines(self._standing, self._runs, width or 80, height or 24)
        *rows, last = str(self), *lines
        drawn = "".join(f"{ERASE_LINE}{row}\n" for row in rows) + ERASE_BELOW + last
        self.fp.write(f"\r{drawn}{UP * len(lines)}\r")
        self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Erase bar and lines, for a line that is printed in their place."""
        if not self.live:
            super().clear(nolock)
        elif not self.disable:
            self.fp.write(f"\r{ERASE_BELOW}")

    def close(self) -> None:
        """Leave the bar on the screen, without lines under it."""
        self._standing, self._runs = Standing(), []
        super().close()


def table_lines(standing: Standing, runs: Sequence[LiveRun], width: int, height: int) -> list[str]:
    """The lines under the bar on a terminal of `width` columns and `height` rows, of which FREE are left free: the best
    run of each arm from the lowest loss on, the runs under way, and the number of faults of each kind.

    No line is as wide as the terminal: a long name loses its middle, everything else its end. Where rows are missing,
    the runs under way have at least half of them, and each part ends with the number of its rows left out.
    """
    names = [len(run.slot) for run in standing.best] + [len(run.slot) for run in runs]
    room = max(8, min(width // 2, max(names, default=0)))
    best_rows, run_rows = _best_rows(standing.best, room), _run_rows(runs, room)
    fault_rows = _fault_rows(standing.faults)
    free = max(0, height - FREE - len(fault_rows))
    run_rows = _fitting(run_rows, max(free // 2, free - len(best_rows)))
    best_rows = _fitting(best_rows, free - len(run_rows))
    rows = [*best_rows, *run_rows, *fault_rows][: max(0, height - FREE)]
    return [disp_trim(row, max(0, width - 1)).rstrip() for row in rows]


def _best_rows(best: Sequence[BestRun], room: int) -> list[str]:
    def order(run: BestRun) -> tuple[bool, float]:
        return math.isnan(run.loss), run.loss

    rows = [_row("best so far", room, "loss", "setting")]
    for run in sorted(best, key=order):
        rows.append(_row(_named(run.slot, room), room, _number(run.loss, 4), setting_text(run.setting)))
    return rows


def _run_rows(runs: Sequence[LiveRun], room: int) -> list[str]:
    rows = [_row("running here", room, "loss", "max logit  step")]
    for run in runs:
        done = f"{0 if run.step is None else run.step + 1:>{len(str(run.steps))}}/{run.steps}"
        rest = f"{_number(run.max_logit, 1):>9}{GAP}{done}"
        rows.append(_row(_named(run.slot, room), room, _number(run.loss, 4), rest))
    return rows


def _fault_rows(faults: Sequence[Fault]) -> list[str]:
    counts = Counter(fault.status for fault in faults)
    return (
        [f"faults so far: {', '.join(f'{count} {kind}' for kind, count in counts.items())}"] if counts else []
    )


def _row(name: str, room: int, loss: str, rest: str) -> str:
    return f"{name:<{len(INDENT) + room}}{GAP}{loss:>9}{GAP}{rest}"


def _named(name: str, room: int) -> str:
    """The name, indented, in at most `room` characters: a longer one loses its middle."""
    if len(name) > room:
        tail = (room - 2) // 2
        name = f"{name[: room - 2 - tail]}..{name[len(name) - tail :]}"
    return INDENT + name


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.3g}"


def _fitting(rows: list[str], room: int) -> list[str]:
    """A head and its rows in at most `room` lines; none of them where only the head would be left."""
    if len(rows) < 2 or room < 2:
        return []
    if len(rows) <= room:
        return rows
    return [*rows[: room - 1], f"{INDENT}and {len(rows) - room + 1} more"]
