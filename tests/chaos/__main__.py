"""make chaos: studies of 24 tiny runs under a fault injector, and the same commands that must finish them.

    PYTHONPATH=tests python -m chaos [--seed N] [--faults 500] [--rounds N] [--without KIND] [--folder PATH] [--short]

The seed draws the plan of every round, its faults and their moments; processes take their own time, so the same seed
makes similar rounds, not equal ones. Exit code 1 where anything was lost, doubled, different, left behind, shown as a
traceback or failed for good; such rounds are kept in the folder that the last lines name.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from chaos.disk import can_mount, isolate
from chaos.faults import KINDS
from chaos.processes import end
from chaos.round import Round
from chaos.study import SHORT, Places, Plan, draw_plan, train_twin
from chaos.verdict import CATEGORIES, Violation, diverged

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NAN = "NaN: settings that diverge"


class Progress:
    """One line at the bottom of the terminal, or one a minute in a file: what runs, and the time that is left."""

    def __init__(self, faults: int):
        self.faults, self.began, self.last = faults, time.monotonic(), 0.0

    def show(self, title: str, before: int, one: Round) -> None:
        """How far a round is; before: faults of the earlier ones."""
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if now - self.last < (0.2 if terminal else 60):
            return
        self.last, spent = now, now - self.began
        injected = before + len(one.injected)
        left = f"{spent / injected * (self.faults - injected) / 60:.0f} min left" if injected else "?"
        line = f"{injected} of {self.faults} faults, {left}; {title}: start {one.starts}"
        print(
            f"\r{line[:118]:<118}" if terminal else line,
            end="" if terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    @staticmethod
    def say(line: str) -> None:
        """A line that stays."""
        print(f"\r{line:<118}" if sys.stderr.isatty() else line, flush=True)


def main() -> int:
    """0: nothing was wrong. 1: something was. 130: Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1_000_000), help="default: a new one, printed"
    )
    parser.add_argument("--faults", type=int, default=500, help="rounds go on until so many were injected")
    parser.add_argument("--rounds", type=int, default=1000, help="at most so many")
    parser.add_argument(
        "--short", action="store_true", help="one round of a study of ten runs, with short locks"
    )
    parser.add_argument(
        "--folder", type=Path, help="kept, with the undisturbed studies; default: a temporary one"
    )
    parser.add_argument(
        "--without", action="append", default=[], choices=list(KINDS), metavar="KIND", help="leave a kind out"
    )
    given = parser.parse_args()
    isolate()
    for number in STOPS:
        signal.signal(number, _stop)  # also so that no command inherits one that is ignored
    folder = (given.folder or Path(tempfile.mkdtemp(prefix=f"muonlab-chaos-{given.seed}-"))).absolute()
    print(f"seed {given.seed}, in {folder}", flush=True)
    if not can_mount():
        skipped = ", ".join(kind.name for kind in KINDS.values() if kind.mounts)
        print(f"skipped, since no file system can be mounted here: {skipped}")
    try:
        return study_chaos(given, folder)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    finally:
        if given.folder is None and not any(folder.glob("kept-*")):
            shutil.rmtree(folder, ignore_errors=True)


def _stop(number: int, frame: object) -> None:
    """What was started is ended before the command is, however often it is asked."""
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def study_chaos(given: argparse.Namespace, folder: Path) -> int:
    """The rounds, and the table of what was injected and what came of it."""
    counts: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    twins: dict[str, Places] = {}
    progress = Progress(given.faults)
    number, began = 0, time.monotonic()
    while counts.total() < given.faults and number < given.rounds:
        number += 1
        draw = random.Random(f"{given.seed}/{number}")
        plan = SHORT if given.short else draw_plan(draw)
        if plan.command not in twins:
            progress.say(f"training the {plan.command} that nobody disturbs ...")
            twins[plan.command] = _twin(plan, folder)
        twin = twins[plan.command]
        faults = given.faults - counts.total() if given.short else min(40, given.faults - counts.total())
        one = Round(
            mark=f"{folder.name}/{number}",
            plan=plan,
            folder=folder / f"round-{number:03d}",
            random=draw,
            faults=faults,
            every=1.5 if given.short else 2.5,
            longest_lock=2.0 if given.short else 60.0,
            without=tuple(given.without),
        )
        show = partial(progress.show, f"round {number} ({plan})", counts.total(), one)
        try:
            violations = one.run(twin, show)
        except BaseException:
            one.remove(None)
            raise
        counts.update(fault.kind for fault in one.injected)
        counts[NAN] += diverged(twin)
        wrong.update(violation.kind for violation in violations)
        progress.say(
            f"round {number}: {plan}; {len(one.injected)} faults, {one.starts} starts, {len(violations)} violations"
        )
        _report(one, violations, given.seed, number, folder)
    _table(counts, wrong, number, time.monotonic() - began)
    return 1 if wrong else 0


def _twin(plan: Plan, folder: Path) -> Places:
    mark = f"{folder.name}/twin"
    try:
        return train_twin(plan, folder / f"twin-{plan.command}", mark)
    finally:
        end(mark)


def _report(one: Round, violations: list[Violation], seed: int, number: int, folder: Path) -> None:
    kept = folder / f"kept-{number:03d}" if violations else None
    if kept is not None:
        lines = [f"seed {seed}, round {number}: {one.plan}", *map(str, one.injected), *map(str, violations)]
        kept.mkdir()
        (kept / "round.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("\n".join(f"  {line}" for line in lines))
        print(f"  kept: {kept}", flush=True)
    one.remove(kept)


def _table(counts: Counter[str], wrong: Counter[str], rounds: int, seconds: float) -> None:
    print(f"\n{'kind of fault':<28}injected")
    for name in [*KINDS, NAN]:
        print(f"{name:<28}{counts[name]:8d}")
    print(f"{'all':<28}{counts.total():8d}   in {rounds} rounds, {seconds / 60:.0f} minutes\n")
    for category in CATEGORIES:
        print(f"{category:<28}{wrong[category]:8d}")


if __name__ == "__main__":
    sys.exit(main())
