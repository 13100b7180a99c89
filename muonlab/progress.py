"""A progress bar whose times hold when somebody sets the clock."""

import time
from typing import TypedDict, Unpack

from tqdm import tqdm


class Look(TypedDict, total=False):
    """Those of tqdm's settings that the bars here use."""

    desc: str
    total: int
    initial: int
    unit: str
    unit_scale: bool
    mininterval: float
    dynamic_ncols: bool
    smoothing: float
    leave: bool
    disable: bool | None


class Progress(tqdm):
    """tqdm on the monotonic clock, moved on by `update`; `look` are settings of tqdm.

    tqdm reads the wall clock, so a clock that is set back gives negative times and one that is set forward a bar that
    seems to have stalled for hours.
    """

    monitor_interval = 0  # its thread would compare these times with the wall clock

    def __init__(self, **look: Unpack[Look]):
        super().__init__(None, miniters=0, **look)  # 0: the time alone decides when to print
        self._time = time.monotonic
        self.start_t = self.last_print_t = self._time()
