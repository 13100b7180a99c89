"""Long-running commands import this first: what must hold while everything else is imported.

Threads sleep while they wait; torch's OpenMP reads that setting when it is loaded. Compiled code goes into the data's
cache, which outlives /tmp, so that the next run of its kind starts warm; torch's compiler reads that when it is loaded.
A signal ends the command with the same sentence as later, when `run_command` handles signals; nothing has begun yet.
"""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_CACHE = Path(os.path.expanduser(os.environ.get("MUONLAB_CACHE") or ".cache/muonlab")).absolute()
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_CACHE / "compiled"))


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    from muonlab.command import STOPPED, tell

    tell(STOPPED)
    os._exit(128 + number)


for _number in (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
):  # command.STOPPING, which takes too long to import
    if signal.getsignal(_number) is not signal.SIG_IGN:
        signal.signal(_number, _leave)
