"""No line of a forward or an update mixes devices, or copies from one to another: seen on a CPU.

torch's fake tensors have a shape and a device and no memory. That of CUDA needs a guard for its device, which a build
for CPUs lacks: one that does nothing is compiled here. The engine of autograd asks for the device itself, so backward
passes are left to `make gpu-check`.
"""

import ctypes
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muonlab.models import build_model, flex
from muonlab.models.experts import GROUPED_DTYPES
from muonlab.models.router import Router
from muonlab.optim import build_optimizer, list_optimizers

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
}
"""


class Copies(TorchDispatchMode):
    """Collects the operations that have tensors on both devices; those that mix them raise by themselves."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if {x.device.type for x in tensors} == {"cpu", "cuda"}:
            self.seen.append(func)
        return out


class NotZero(TorchDispatchMode):
    """Says that weights are not zero, which some optimizers ask before the first step and fake ones cannot answer."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return True if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def kernel(q, k, v, *, block_mask, enable_gqa, return_aux):
    """FlexAttention's signature; fake tensors cannot be compiled."""
    assert {x.device.type for x in (q, k, v, block_mask.kv_indices)} == {"cuda"}
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT
    return scores.softmax(-1) @ v, SimpleNamespace(lse=scores.logsumexp(-1), max_scores=scores.amax(-1))


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    if torch.cuda.is_available():
        pytest.skip("the device has a guard of its own, and tests of its own")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder, torch_folder = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    (folder / "guard.cpp").write_text(GUARD)
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", "guard.cpp"]
    command += ["-o", "guard.so", f"-L{torch_folder / 'lib'}", "-lc10"]
    subprocess.run(command, cwd=folder, check=True)
    ctypes.CDLL(str(folder / "guard.so"))


@pytest.fixture
def fake(guard, monkeypatch):
    monkeypatch.setattr(flex, "_kernel", lambda: kernel)
    flex._causal_block_mask.cache_clear()
    yield FakeTensorMode(allow_non_fake_inputs=True)
    flex._causal_block_mask.cache_clear()


def moved(model, mode):
    """The model with fake parameters and buffers on CUDA, tied ones still tied."""
    new = {}
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if parameter not in new:
                        new[parameter] = torch.nn.Parameter(torch.empty_like(parameter, device="cuda"))
                    module._parameters[name] = new[parameter]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to("cuda")
            if isinstance(module, Router):
                module.loads, module.ended_loads = module.loads.to("cuda"), module.ended_loads.to("cuda")
    return model


@contextmanager
def settled(mode):
    """Within it, a second step: what lay on the CPU at first, such as the clip's indices, has followed the weights."""
    copies = Copies()
    with mode, copies:
        yield
    assert not copies.seen


def step(model, optimizer, tokens):
    model(tokens, tokens)
    optimizer.observe(model.max_logits())
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.gammas()


def two_steps(fake, name="nanogpt", optimizer="muonclip", model=None, **settings):
    sizes = dict(vocab_size=64, context=24, d_model=64, num_layers=3)
    model = moved(build_model(name, **{**sizes, **(model or {})}), fake)
    with NotZero():
        optimizer = build_optimizer(optimizer, model, **settings)
    with fake, NotZero():
        tokens = torch.zeros(2, 24, dtype=torch.long, device="cuda")
        step(model, optimizer, tokens)
    with settled(fake):
        step(model, optimizer, tokens)
    return model, optimizer, tokens


@pytest.mark.parametrize("optimizer", list_optimizers())
def test_an_update_stays_on_its_device(fake, optimizer):
    two_steps(fake, optimizer=optimizer)


@pytest.mark.parametrize(
    "settings",
    [
        dict(clip_momentum="project", per="layer"),
        dict(clip_momentum="scale", clip_average=0.5, clip_power=0.5, maximum="absolute"),
        dict(quack=1.0, per_head=True),
        dict(lookahead=0.5, tail_share=0.5, tail_horizon=2),
        dict(weight_decay=0.1, cautious=True, momentum_kind="ema_corrected", ns_schedule="svd"),
        dict(update_norm="relative", weight_norm="fixed"),
    ],
    ids=str,
)
def test_the_stages_of_an_update_stay_on_their_device(fake, settings):
    two_steps(fake, **settings)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        (
            "nanogpt",
            dict(num_heads=4, num_kv_heads=2, attention_sink="learnt", attention_gate="head", bias=True),
        ),
        ("nanogpt", dict(num_heads=8)),  # too narrow for FlexAttention
        ("nanogpt", dict(num_heads=8, attention_sink="zero", fused_qkv=True)),
        ("nanogpt", dict(attention_soft_cap=20.0, softmax_dtype="bfloat16", tied_head=True, z_loss=1e-4)),
        ("moe", dict(num_experts=4, expert_hidden=16)),
        ("moe", dict(num_experts=4, expert_hidden=16, balance="loss", attention="mha")),
    ],
    ids=str,
)
def test_a_forward_and_what_is_measured_of_it_stay_on_the_device(fake, name, model, monkeypatch):
    if name == "moe":  # in fp32 the experts' products are padded, for which the host waits
        monkeypatch.setitem(GROUPED_DTYPES, "cuda", (torch.float32,))
    model, _, tokens = two_steps(fake, name, model=model)
    documents = tokens.cumsum(1)
    with settled(fake):
        model(tokens, tokens, documents=documents)
        model.bounded_logits()
        model.logit_extremes()
        with torch.no_grad():
            model.eval()(tokens, tokens, measure_entropy=True)
        model.attention_entropy(), model.one_hot_share()
        if name == "moe":
            model.measurements(), model.update_balance(), model.expert_loads()
