"""Imported before anything else by the commands that take long: what must hold while the rest is imported.

Threads sleep while they wait, which torch's OpenMP reads when it is loaded. And a signal is one sentence, as it is
later, when `run_command` hears it: until then nothing was begun.
"""

import os
import signal
from types import FrameType
from typing import NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    from muonlab.command import STOPPED, tell

    tell(STOPPED)
    os._exit(128 + number)


for _number in (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
):  # command.STOPPING, whose import takes its time
    if signal.getsignal(_number) is not signal.SIG_IGN:
        signal.signal(_number, _leave)
