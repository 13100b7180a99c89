"""Within a step the host never waits for the device: on the CPU seen from the operations, on a GPU told by torch."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from muonlab.data import token_data
from muonlab.optim import list_optimizers
from muonlab.optim.combined import CombinedOptimizer
from muonlab.train.module import LanguageModel
from muonlab.train.recording import Recording
from muonlab.train.run import train

aten = torch.ops.aten
# The result's value or shape is needed on the host; lift_fresh begins a tensor made of a list, which is then copied.
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.lift_fresh,
    aten.equal,
    aten._linalg_eigh,
}
EIGEN = ("kl_shampoo", "pmuon", "shampoo", "soap", "soap_muon")  # solvers of eigenvalues answer to the host
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class NoWaits(TorchDispatchMode):
    """Refuses what makes the host wait where the tensors are on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        masks = [i for i in args[1] if i is not None and i.dtype is torch.bool] if packet in INDEXING else []
        assert packet not in WAITS, f"the host waits for {func}"
        assert not masks, f"the host waits for the number of entries that a mask selects, in {func}"
        return func(*args, **(kwargs or {}))


@contextmanager
def told_by_torch():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watch(monkeypatch, cls, name, no_waits, first=0):
    method, calls = getattr(cls, name), []

    def watched(self, *args, **kwargs):
        calls.append(name)
        with no_waits() if len(calls) > first else nullcontext():
            return method(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, watched)
    return calls


def watch_all(monkeypatch, no_waits, first=0):
    places = [(LanguageModel, "training_step"), (CombinedOptimizer, "step"), (Recording, "_measure")]
    return [watch(monkeypatch, cls, name, no_waits, first) for cls, name in places]


MIXTURE = ["model=moe_xs", "model.num_layers=2", "model.num_experts=8", "model.expert_hidden=16"]
FEW = ["trainer.max_steps=3", "trainer.probe_every=1", "trainer.val_every=0"]
BOUNDED = ["trainer.exact_every=2"]
# Where no kernel reports maxima, bounds decide on the host which heads a clip needs: one documented wait a step.
RUNS = [
    [f"optimizer={name}", *([] if name.endswith("clip") else BOUNDED)]
    for name in list_optimizers()
    if name not in EIGEN
]


@pytest.mark.parametrize("overrides", [*RUNS, MIXTURE])
def test_no_forward_update_or_recorded_column_of_a_run_waits_for_the_device(tiny, monkeypatch, overrides):
    """By a kernel that does not report its maxima: without a clip, exact at even steps and bounds at odd ones."""
    watched = watch_all(monkeypatch, NoWaits)
    monkeypatch.setattr("muonlab.models.attention.EXPLICIT_CONTEXT", 0)
    windows = token_data._windows

    def unwatched(*arguments):  # a batch begins on the host
        with _disable_current_modes():
            return windows(*arguments)

    monkeypatch.setattr(token_data, "_windows", unwatched)
    outcome = train(tiny("model.num_layers=1", "schedule.warmup=0", *FEW, *overrides))
    assert outcome.status == "finished"
    assert all(watched)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "overrides", [["optimizer=adamw"], ["optimizer=muon"], ["optimizer=muonclip"], MIXTURE]
)
def test_no_step_of_a_run_on_a_gpu_waits_for_it(tiny, monkeypatch, overrides):
    """From its second step on, since the first one makes state and moves the clip's indices.

    In bf16 with heads wide enough for FlexAttention, whose own highest logit the clip reads at any cadence."""
    wide = [] if overrides is MIXTURE else ["model.d_model=64", "model.num_heads=2"]
    precision = ["trainer.device=cuda", "trainer.precision=bf16"]
    train(tiny("schedule.warmup=0", *precision, *wide, *FEW, *BOUNDED, *overrides))  # compiles its kernels
    watched = watch_all(monkeypatch, told_by_torch, first=1)
    outcome = train(tiny("schedule.warmup=0", "seed=2", *precision, *wide, *FEW, *BOUNDED, *overrides))
    assert outcome.status == "finished"
    assert all(len(calls) > 1 for calls in watched)


def test_what_waits_is_seen():
    mask = torch.ones(2, dtype=torch.bool)
    waiting = [
        lambda: mask.sum().item(),
        lambda: mask[mask],
        lambda: torch.tensor([1.0]),
        lambda: bool(mask.any()),
    ]
    for wait in waiting:
        with pytest.raises(AssertionError), NoWaits():
            wait()
