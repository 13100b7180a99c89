"""How a run ends: its status and cause, and whether that is an outcome of its settings or a fault around it."""

import math
import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from muonlab.errors import EnvironmentFault
from muonlab.plugins import plugin_fault
from muonlab.runtime import memory
from muonlab.train.callbacks import Diverged, Interrupted
from muonlab.train.peers import lost_peer, peer_fault

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# Of CUDA, of a CPU's allocator, and of a library such as cuBLAS, which other runs on the GPU left no workspace.
NO_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
SIZE = r"([\d.]+) ([KMGT]?)i?[Bb](?:ytes)?"  # as torch's allocator on a GPU writes one: 518.00 MiB, 512 bytes


@dataclass(frozen=True)
class Ending:
    """One of RunRecord's statuses, its cause, the number of the signal that interrupted the run (0: none), and the
    exception to raise once that is recorded."""

    status: str
    cause: str = ""
    signal: int = 0
    error: BaseException | None = None


def how_it_ended(metrics: Mapping[str, float]) -> Ending:
    """The ending of a run that did its last step, by its final metrics."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            return Ending("diverged", f"{name} is {value} after the last step")
    return Ending("finished")


def ending_of(error: BaseException, step: int) -> Ending:
    """The ending of a run that `error` stopped in step `step`.

    Memory is an outcome of the settings where the run alone asked for more than this machine has; where other processes
    held what it needed, or a lower limit was set, another try may succeed.
    """
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, Diverged):
        return Ending("diverged", text)
    if isinstance(error, Interrupted):
        return Ending("interrupted", text, error.number)
    if isinstance(error, KeyboardInterrupt | EnvironmentFault):
        return Ending("interrupted", text, error=error)
    if lost_peer(error):
        fault = peer_fault()
        fault.__cause__ = error
        return Ending("interrupted", str(fault), error=fault)
    if isinstance(error, torch.linalg.LinAlgError):  # of svd, on gradients that are not finite
        return Ending("diverged", f"step {step}: {text}")
    if _out_of_memory(error):
        if _own_size(error) > _capacity(error):
            return Ending("out-of-memory", text)
        fault = EnvironmentFault(f"not enough memory is free, though this run alone would fit: {text}")
        fault.__cause__ = error
        return Ending("interrupted", str(fault), error=fault)
    if isinstance(error, OSError):
        fault = EnvironmentFault(
            f"the system refused {error.filename or 'a file'}: {error.strerror or error}"
        )
        fault.__cause__ = error
        return Ending("interrupted", str(fault), error=fault)
    if (named := plugin_fault(error)) is not None:
        return Ending("failed", str(named), error=named)
    return Ending("failed", f"{type(error).__name__}: {text}", error=error)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    )


def _own_size(error: BaseException) -> float:
    """Bytes that this process holds plus those it was refused, on the device that refused them.

    A GPU's are those that its allocator's message states: some of them are free again once the error has come here. The
    only process with memory on it is this one, under whatever number a container's host knows it.
    """
    text = str(error)
    if not _on_cuda(error):
        return _resident() + _refused(text)
    holders = re.findall(rf"(this process|Process \d+) has {SIZE} memory in use", text)
    own = [holder for holder in holders if holder[0] == "this process" or len(holders) == 1]
    if own:
        return _bytes(*own[0][1:]) + _refused(text)
    parts = re.findall(rf"{SIZE} is (?:allocated|reserved) by PyTorch", text)
    held = sum(_bytes(*part) for part in parts) if parts else torch.cuda.memory_allocated()
    return held + _refused(text)


def _capacity(error: BaseException) -> float:
    if not _on_cuda(error):
        return memory()
    stated = re.search(rf"total capacity of {SIZE}", str(error))
    return _bytes(*stated.groups()) if stated else torch.cuda.mem_get_info()[1]


def _on_cuda(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def _bytes(number: str, unit: str) -> float:
    return float(number) * UNITS[unit.lower()]


def _resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _refused(text: str) -> float:
    """Bytes that an allocator's message says it could not allocate; 0 where it names none.

    torch on a CPU: "you tried to allocate 123 bytes"; on CUDA: "Tried to allocate 2.00 GiB"; NumPy: "Unable to allocate
    1.5 TiB for an array".
    """
    match = re.search(r"allocate ([\d.]+) ?(\w?)i?b(?:ytes)?\b", text, re.IGNORECASE)
    return float(match[1]) * UNITS.get(match[2].lower(), 1) if match else 0.0
