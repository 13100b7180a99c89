"""How a process uses this machine: threads sleep while they wait, and freed memory is kept."""

import ctypes
import os
import sys

# From glibc's malloc.h, which refuses an mmap threshold above 32 MiB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_MAX = 32 << 20


def keep_freed_memory() -> bool:
    """Make glibc keep freed buffers instead of returning them to the kernel after every operation.

    By default buffers above 128 KiB to 32 MiB are mapped afresh for every use, and a small model pays for the page
    faults in every step (`make bench-step` measures how much). Returns False, and does nothing, where there is no
    glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)) and bool(
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    )


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """Bytes of main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def settle(num_threads: int) -> None:
    """Call once per process, before the first tensor operation.

    OpenMP threads sleep while they wait, since two processes whose threads spin run an order of magnitude slower. torch
    reads the policy when it loads OpenMP, so commands set it before they import torch; here it is set for children.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    import torch

    torch.set_num_threads(num_threads)
