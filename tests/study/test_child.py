"""How the process of a run says how it went, when a signal reaches it before it trains."""

import os
import subprocess
import sys

import pytest

from muonlab import command
from muonlab.study.child import Gauge, Result, _attempt


@pytest.fixture
def torn_imports(monkeypatch):
    """torn_imports(sent) -> the import of muonlab.train.run ends as a library's does that a signal, if one is sent,
    tears out of its work: with an error of the library's own."""

    class Torn:
        def __init__(self, sent):
            self.sent = sent

        def __getattr__(self, name):
            if self.sent:
                try:
                    os.kill(os.getpid(), self.sent)
                except KeyboardInterrupt:
                    raise RuntimeError("function '_has_torch_function' already has a docstring") from None
            raise RuntimeError("libcudart.so is missing")

    monkeypatch.setattr(command, "_asked", [])
    # The import looks at the module twice, and GRACE seconds after a second signal a process ends: here, pytest's.
    monkeypatch.setattr(command, "_end_now", lambda code: None)
    return lambda sent: monkeypatch.setitem(sys.modules, "muonlab.train.run", Torn(sent))


def test_a_mistake_that_no_parent_is_left_to_hear_is_no_traceback():
    code = """
import sys
from muonlab.study.child import try_out
class Closed:
    def send(self, text):
        raise BrokenPipeError
try_out({"search/muon": {"model": {"name": "none"}}}, Closed())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("sent", command.STOPPING)
def test_a_signal_that_tears_the_imports_of_a_run_apart_is_an_interruption(tiny, torn_imports, sent, capsys):
    torn_imports(sent)
    assert _attempt(tiny(), Gauge()) == Result("interrupted", "stopped before the first step")
    assert "Traceback" not in capsys.readouterr().err


def test_imports_that_break_by_themselves_are_a_failure(tiny, torn_imports, capsys):
    torn_imports(None)
    result = _attempt(tiny(), Gauge())
    assert result == Result("failed", "RuntimeError: libcudart.so is missing")
    assert "Traceback" in capsys.readouterr().err
