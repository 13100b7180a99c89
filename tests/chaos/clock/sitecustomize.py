"""The wall clock of a process under test, moved by the seconds in the file that $MUONLAB_CHAOS_CLOCK names.

Python imports this module before any other where its folder is on PYTHONPATH. Monotonic clocks stay: nobody can move
those.
"""

import ctypes
import gc
import os
import time
from datetime import UTC, datetime

SECONDS, NANOSECONDS = time.time, time.time_ns
PLACE = os.environ["MUONLAB_CHAOS_CLOCK"]


def moved() -> float:
    """Seconds by which the clock is wrong now."""
    try:
        with open(PLACE) as file:
            return float(file.read())
    except (OSError, ValueError):
        return 0.0


def now(cls, tz=None):
    """For datetime.now."""
    return cls.fromtimestamp(time.time(), tz)


def utcnow(cls):
    """For datetime.utcnow."""
    return cls.fromtimestamp(time.time(), UTC).replace(tzinfo=None)


time.time = lambda: SECONDS() + moved()
time.time_ns = lambda: NANOSECONDS() + int(moved() * 1e9)
# The class must stay the one that pandas and Arrow know: its methods are exchanged in place. `today` asks time.time.
[methods] = gc.get_referents(datetime.__dict__)
methods["now"], methods["utcnow"] = classmethod(now), classmethod(utcnow)
ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime))
