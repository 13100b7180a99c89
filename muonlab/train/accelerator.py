"""The device of a run, and whether its steps are compiled."""

import os

import torch

from muonlab.errors import MuonlabError
from muonlab.train.config import TrainerSettings

WORTH = {"cpu": 5e12, "cuda": 5e15}
"""The floating-point operations of a run that pay for compiling it, with trainer.compile=auto. On a CPU a cold
compilation took 31 to 34 s and saved 17 to 23 % of a step (results/speed/README.md): it pays after two to three
minutes, in which one thread does 3e12 to 8e12 operations. No GPU was measured: one is taken to be a thousand times as
fast."""


def choose_accelerator(settings: TrainerSettings) -> str:
    """cpu or cuda; raises MuonlabError for devices that this machine lacks and a precision that they do not support."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = settings.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    have = gpus if device == "cuda" else os.cpu_count() or 1
    if settings.devices > have:
        what = "CUDA devices" if device == "cuda" else "processor cores"
        raise MuonlabError(
            f"trainer.device={settings.device} trainer.devices={settings.devices}: this machine has {have} {what}"
        )
    if settings.precision == "fp16" and device == "cpu":
        raise MuonlabError(
            "trainer.precision=fp16 needs a GPU, where a gradient scaler preserves small gradients; use bf16 on a CPU"
        )
    if settings.compile is True and device == "cpu":
        _require_compiler()
    return device


def is_compiled(settings: "TrainerSettings", accelerator: str, flops: float) -> bool:
    """Whether a run with so many floating-point operations is compiled on this device.

    It follows from the config and the machine and never from a clock, so that a run is the same again. auto: neither
    under FSDP2, which does not compile, nor on a CPU without a C++ compiler.
    """
    if settings.compile != "auto":
        return settings.compile
    able = accelerator == "cuda" or _has_compiler()
    return settings.strategy != "fsdp2" and able and flops > WORTH[accelerator]


def _require_compiler() -> None:
    """Raises MuonlabError where no C++ compiler is found."""
    if not _has_compiler():
        raise MuonlabError(
            "trainer.compile=true needs a C++ compiler on a CPU, and there is none; install g++ or name one in $CXX"
        )


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
