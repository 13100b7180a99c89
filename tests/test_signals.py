"""What a command does when it is asked to stop: one sentence, the code of the signal, and time to end in order."""

import signal
import subprocess
import sys

import pytest

COMMAND = """
import sys, time
from muonlab import command
command.GRACE = float(sys.argv[1])

def main():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("stopping", flush=True)
        time.sleep(float(sys.argv[2]))
        print("in order", flush=True)

command.run_command(main)
"""
SENTENCE = "muonlab: stopped; rerun the same command to resume\n"


def begun(grace, ending, ignored=()):
    def handlers():  # whatever those of the process that tests are
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(grace), str(ending)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=handlers,
    )
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_each_signal_is_one_sentence_and_its_code(name, code):
    process = begun(10, 0)
    process.send_signal(signal.Signals[name])
    assert process.communicate(timeout=60) == ("stopping\nin order\n", SENTENCE)
    assert process.returncode == code


def test_a_second_signal_does_not_tear_the_end_apart():
    process = begun(60, 0.5)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("in order\n", SENTENCE)
    assert process.returncode == 130


def test_an_end_that_hangs_is_cut_short_by_the_second_signal():
    process = begun(0.1, 60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", SENTENCE)
    assert process.returncode == 143


def test_a_signal_that_is_ignored_stays_so():
    """As SIGHUP under nohup."""
    process = begun(10, 0, ignored=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.parametrize(
    "program",
    [
        "import muonlab.begin, time\nprint('begun', flush=True)\ntime.sleep(60)",  # the rest is still imported
        "from muonlab import command\nimport time\n"
        "def main():\n"
        "    try:\n        print('begun', flush=True)\n        time.sleep(60)\n"
        "    finally:\n        None.flags  # of a library that is torn out of its work\n"
        "command.run_command(main)",
    ],
    ids=["during imports", "within a library"],
)
def test_a_signal_is_one_sentence_whatever_it_tears_apart(program):
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", SENTENCE)
    assert process.returncode == 143


GARBAGE = """
import gc, sys, time
from muonlab import command

class Cycle:
    def __del__(self):
        print("collecting", flush=True)
        time.sleep(2)

def main():
    cycle = Cycle()
    cycle.itself = cycle
    del cycle
    gc.collect()
    time.sleep(60)

command.run_command(main)
"""


def test_a_signal_while_python_collects_garbage_is_not_lost():
    """There Python drops what a handler raises, and prints a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-c", GARBAGE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "collecting\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", SENTENCE)
    assert process.returncode == 143
