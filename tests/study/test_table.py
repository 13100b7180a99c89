"""The live table of a study: its lines for every size of terminal, and what a real one shows of them."""

import fcntl
import math
import os
import pty
import re
import struct
import sys
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonlab.errors import EnvironmentFault
from muonlab.study.child import Gauge
from muonlab.study.standing import BestRun, Fault, LiveRun, Standing
from muonlab.study.table import FREE, Table, table_lines

ADAMW = BestRun("search/adamw", 1.91234, "search/adamw/2/s0", {"lr": 0.00312, "weight_decay": 0.1}, 4)
MUON = BestRun(
    "search/muon", 1.8, "search/muon/published/s0", {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}, 12
)
EARLY = LiveRun("search/muonclip/3/s0", None, 400, None, None)
LATE = LiveRun("search/muonclip/published/s0", 119, 400, 2.13456, 34.21)
FAULTS = (Fault("a", "killed", "out of memory"), Fault("b", "failed", "a bug"), Fault("b", "killed", ""))


def test_every_number_has_its_column():
    lines = table_lines(Standing((ADAMW, MUON), FAULTS), [EARLY, LATE], 80, 24)
    assert lines == [
        "best so far                          loss  setting",
        "  search/muon/published/s0         1.8000  lr 0.02, weight_decay 0.1, momentum",
        "  search/adamw/2/s0                1.9123  lr 0.00312, weight_decay 0.1",
        "running here                         loss  max logit  step",
        "  search/muonclip/3/s0                  -          -    0/400",
        "  search/muonclip/published/s0     2.1346       34.2  120/400",
        "faults so far: 2 killed, 1 failed",
    ]


def test_nothing_is_shown_of_nothing():
    assert table_lines(Standing(), [], 80, 24) == []


@pytest.mark.parametrize(
    ("value", "loss", "logit"),
    [
        (math.nan, "nan", "nan"),
        (math.inf, "inf", "inf"),
        (-math.inf, "-inf", "-inf"),
        (3e38, "3e+38", "3e+38"),
    ],
)
def test_a_run_that_diverges_is_shown(value, loss, logit):
    [_, row] = table_lines(Standing(), [LiveRun("raised/muon/s1", 4, 9, value, value)], 80, 24)
    assert row.split() == ["raised/muon/s1", loss, logit, "5/9"]


def test_a_loss_that_is_no_number_comes_last():
    none = BestRun("a", math.nan, "none", {}, 1)
    lines = table_lines(Standing((none, ADAMW, MUON)), [], 80, 24)
    assert [line.split()[0] for line in lines[1:]] == [MUON.slot, ADAMW.slot, "none"]


def test_a_long_name_loses_its_middle_and_no_number():
    name = "a_condition_with_a_long_name/an_arm_with_a_long_name/0.0123/s12"
    [_, row] = table_lines(Standing(), [LiveRun(name, 99_999, 100_000, 2.5, 99_999.0)], 80, 24)
    shown, *numbers = row.split()
    assert numbers == ["2.5000", "1e+05", "100000/100000"]
    start, end = shown.split("..")
    assert len(shown) == 40
    assert name.startswith(start)
    assert name.endswith(end)


def test_where_rows_are_missing_the_worst_arms_and_the_last_runs_are_counted():
    arms = [BestRun(f"arm{i}", float(i), f"arm{i}/s0", {}, 1) for i in range(9)]
    runs = [LiveRun(f"run{i}/s0", 1, 9, 1.0, 1.0) for i in range(9)]
    lines = table_lines(Standing(tuple(arms), FAULTS), runs, 80, 14)
    assert [re.split(" {2,}", line.strip())[0] for line in lines] == [
        *("best so far", "arm0/s0", "arm1/s0", "arm2/s0", "and 6 more"),
        *("running here", "run0/s0", "run1/s0", "run2/s0", "and 6 more"),
        "faults so far: 2 killed, 1 failed",
    ]


values = st.none() | st.floats()
names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=70)
bests = st.builds(
    BestRun, names, st.floats(), names, st.dictionaries(names, st.floats(), max_size=3), st.integers(1)
)
lives = st.builds(LiveRun, names, st.none() | st.integers(0, 10**7), st.integers(1, 10**7), values, values)
faults = st.builds(Fault, names, st.sampled_from(["killed", "environment", "failed"]), names)
standings = st.builds(Standing, *(st.lists(each, max_size=12).map(tuple) for each in (bests, faults)))


@given(standings, st.lists(lives, max_size=12), st.integers(0, 200), st.integers(0, 60))
def test_the_lines_fit_every_terminal(standing, runs, width, height):
    lines = table_lines(standing, runs, width, height)
    assert len(lines) <= max(0, height - FREE)
    assert all(columns(line) < max(1, width) and "\n" not in line for line in lines)


def columns(text):
    """tqdm's rule: East Asian wide characters take two."""
    from tqdm.utils import disp_len

    return disp_len(text)


def test_a_gauge_has_no_loss_before_the_first_step():
    gauge = Gauge()
    assert (gauge.steps, gauge.reading) == (0, None)
    gauge.on_reading(math.inf, 34.5)
    assert gauge.reading is None
    gauge.on_step(2**40)
    assert (gauge.steps, gauge.reading) == (2**40, (math.inf, 34.5))
    gauge.on_step(2**40 + 1)
    assert gauge.reading == (math.inf, 34.5)


class Terminal:
    """A pseudo-terminal, and the screen that its output draws: lines that wrap and scroll, and the sequences that the
    table uses. Any other escape sequence is an error."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.stream = open(theirs, "w", encoding="utf-8")  # noqa: SIM115
        self.lines, self.row, self.column = [""], 0, 0

    def screen(self):
        """All lines so far, those that have scrolled off included."""
        for part in re.findall(r"\x1b\[.|[\r\n]|[^\x1b\r\n]", self._output()):
            self._draw(part)
        return [line.rstrip() for line in self.lines]

    def _output(self):
        """What was written, once the system has passed on all of it: up to a bell that is rung now."""
        self.stream.write("\a")
        self.stream.flush()
        output = b""
        while not output.endswith(b"\a"):
            output += os.read(self.ours, 1 << 16)
        return output[:-1].decode()

    def _draw(self, part):
        line = self.lines[self.row]
        if part == "\r":
            self.column = 0
        elif part == "\x1b[A":
            assert self.row > max(0, len(self.lines) - self.height), "beyond the top of the terminal"
            self.row -= 1
        elif part in ("\x1b[K", "\x1b[J"):
            self.lines[self.row] = line[: self.column]
            if part == "\x1b[J":  # the rows below become blank; nothing scrolls back
                self.lines[self.row + 1 :] = [""] * len(self.lines[self.row + 1 :])
        else:
            assert not part.startswith("\x1b"), part
            if part == "\n" or self.column == self.width:
                self.row += 1
                self.column = self.column if part == "\n" else 0
                self.lines += [""] * (self.row == len(self.lines))
            if part != "\n":
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1

    def close(self):
        self.stream.close()
        os.close(self.ours)


@pytest.fixture
def terminal(monkeypatch):
    """terminal(width, height, TERM) -> a Terminal that is stdout and stderr."""
    made = []

    def make(width, height, kind="xterm"):
        made.append(Terminal(width, height))
        monkeypatch.setenv("TERM", kind)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, made[-1].stream)
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 24), (80, 10), (30, 6)])
def test_printed_lines_stay_whole_above_the_table_and_it_leaves_only_the_bar(terminal, width, height):
    screen = terminal(width, height)
    standing = [Standing()]
    said = []
    with Table("search", 4, 400, lambda: standing[0]) as table:
        table.mininterval = 0
        for ended in range(1, 5):
            table._due = 0
            standing[0] = Standing((ADAMW, MUON)[:ended], FAULTS[:ended])
            runs = [LATE] * (5 - ended)
            table.show(100 * ended, ended, runs)
            lines = screen.screen()
            shown = [line for line in lines[len(said) :] if line]
            assert lines[: len(said)] == said
            assert shown[0].startswith("search:")
            assert shown[1:] == table_lines(standing[0], runs, width, height)
            said.append(f"run {ended} has ended")
            Table.write(said[-1])
        assert [line for line in screen.screen() if line][:4] == said
        table.fold()
        Table.write("stopping", file=sys.stderr)
    print("the next line", file=sys.stderr)
    *before, bar, last = [line for line in screen.screen() if line]
    assert before == [*said, "stopping"]
    assert bar.startswith("search: 100%")
    assert last == "the next line"


def test_a_terminal_that_cannot_move_its_cursor_gets_the_bar_alone(terminal):
    screen = terminal(80, 24, "dumb")
    with Table("search", 1, 100, unread) as table:
        table.mininterval = 0
        table.show(50, 0, [LATE])
    [bar] = [line for line in screen.screen() if line]
    assert bar.startswith("search:  50%")


def test_without_a_terminal_it_is_a_plain_bar_and_the_queue_is_not_read(capsys):
    with Table("search", 1, 100, unread) as table:
        table.show(50, 0, [LATE])
    text = capsys.readouterr().err
    assert "search:  50%" in text
    assert "\x1b" not in text
    assert "running" not in text


def unread():
    raise AssertionError("nobody would see it")


def test_a_storage_that_fails_leaves_the_table_as_it_was(terminal):
    screen = terminal(80, 24)

    def fail():
        raise EnvironmentFault("the storage is locked")

    with Table("search", 1, 100, fail) as table:
        table.mininterval = 0
        table.show(1, 0, [LATE])
        assert [line for line in screen.screen() if line][1:] == table_lines(Standing(), [LATE], 80, 24)
