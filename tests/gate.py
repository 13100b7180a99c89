"""Runs that wait in their middle while a file exists, so that on no machine a kill or a signal comes too late.

    python tests/gate.py GATE -m MODULE [ARGUMENT ...]

is `python -m MODULE [ARGUMENT ...]` whose run, or runs, do not finish a step, from 0, that the file GATE names, or a
later one, while GATE exists.
"""

import runpy
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

LIMIT = 120  # seconds after which a gate that nobody opens is an error


def pass_gate(gate, step, asked=lambda: False):
    """Where `step` is the gate's or a later one, wait until the file is gone or the run is asked to stop."""
    deadline = time.monotonic() + LIMIT
    with suppress(FileNotFoundError):
        while step >= int(gate.read_text()) and not asked():
            assert time.monotonic() < deadline, f"nobody removed {gate}"
            time.sleep(0.01)


def hold(gate):
    """From now on the runs of this process wait at the gate."""
    from muonlab.train.providers import Columns, provider

    @provider("gate")
    def wait(step):
        pass_gate(
            gate, step.number, lambda: any(getattr(each, "asked", 0) for each in step.trainer.callbacks)
        )
        return Columns()


def carry_out(gate, *arguments):
    """The body of a process that the pool starts for a run."""
    from muonlab.study import child

    hold(gate)
    child.carry_out(*arguments)


def hold_jobs(gate):
    """From now on the runs that this process's pools start wait at the gate."""
    from gate import carry_out  # by its name, which the fork server can import

    from muonlab.study import pool

    pool.carry_out = partial(carry_out, gate)


def interpreter(gate, folder):
    """An executable in `folder` that is Python, but whose runs wait."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{gate}" "$@"\n')
    path.chmod(0o755)
    return str(path)


if __name__ == "__main__":
    _, place, _, module, *arguments = sys.argv
    (hold_jobs if module == "muonlab.worker" else hold)(Path(place))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
