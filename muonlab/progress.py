"""A progress bar whose times hold when somebody sets the clock."""

import time
from typing import Any

from tqdm import tqdm


class Progress(tqdm):
    """tqdm on the monotonic clock, moved on by `update`; the settings are tqdm's.

    tqdm reads the wall clock, so a clock that is set back gives negative times and one that is set forward a bar that
    seems to have stalled for hours.
    """

    monitor_interval = 0  # its thread would compare these times with the wall clock

    def __init__(self, **settings: Any):
        super().__init__(None, miniters=0, **settings)  # 0: the time alone decides when to print
        self._time = time.monotonic
        self.start_t = self.last_print_t = self._time()
