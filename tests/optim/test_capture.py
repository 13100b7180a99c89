"""A captured step, replayed, is the step: in a CUDA graph, and on the CPU by a tape of operations that does the same.

The tape repeats every operation of the capture on the tensors that it had then and writes to where it wrote then, and
refuses what makes the host wait, as a CUDA graph does.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muonlab.errors import MuonlabError
from muonlab.models import build_model
from muonlab.optim import build_optimizer, list_optimizers

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
ON_HOST = ("kl_shampoo", "shampoo", "soap", "soap_muon")
CAPTURED = 3  # the step that is captured; those before make the state and may choose kernels


class Tape(TorchDispatchMode):
    """The operations of the block under it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits within a capture"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            for place, value in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def weights_after(name, device, replayed, **settings):
    """Of six steps at six rates, from the fourth on by replays of one that was captured."""
    torch.manual_seed(0)
    model = build_model("nanogpt", vocab_size=61, context=16, d_model=32, num_layers=2, num_heads=2).to(
        device
    )
    optimizer = build_optimizer(name, model, **settings)
    rated = [group for group in optimizer.param_groups if "lr" in group]
    for group in rated:
        group["lr"] = torch.tensor(group["lr"], device=device)
    batches = torch.randint(61, (6, 2, 17), generator=torch.Generator().manual_seed(0)).to(device)
    batch = batches[0].clone()

    def step():
        optimizer.zero_grad(set_to_none=False)
        model(batch[:, :-1], batch[:, 1:]).loss.backward()
        optimizer.observe(model.max_logits())
        optimizer.step()

    replay = step
    for i, tokens in enumerate(batches):
        batch.copy_(tokens)
        for group in rated:
            group["lr"].fill_(0.01 * (i + 1))
        if i == CAPTURED and replayed:
            replay = captured(step, device)
        replay()
    return model.state_dict()


def captured(step, device):
    """What repeats a step that this call has not taken."""
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay
    tape = Tape()

    def replay():  # a tape cannot be made without running what it holds
        if tape.calls:
            tape.replay()
        else:
            with tape:
                step()

    return replay


@devices
@pytest.mark.parametrize("name", [name for name in list_optimizers() if name not in (*ON_HOST, "pmuon")])
def test_replays_of_a_captured_step_are_steps(name, device):
    settings = {"tau": 0.1} if name.endswith("clip") else {}
    expected, actual = (weights_after(name, device, replayed, **settings) for replayed in (False, True))
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        *((name, {}, f"rule '{name}'") for name in ON_HOST),
        ("pmuon", {}, "before=pmuon"),
        ("muon", {"lookahead": 1.0}, "lookahead or a tail average"),
        ("muonclip", {"windows": [(0, 5)]}, "a clip with windows or a running average"),
        ("muonclip", {"clip_average": 0.5}, "a clip with windows or a running average"),
    ],
)
def test_what_advances_on_the_host_is_refused_at_the_capture_and_nothing_moves(
    monkeypatch, name, settings, named
):
    model = build_model("nanogpt", vocab_size=61, context=16, d_model=32, num_layers=1, num_heads=2)
    optimizer = build_optimizer(name, model, **settings)
    tokens = torch.randint(61, (2, 16))
    model(tokens, tokens).loss.backward()
    optimizer.observe(model.max_logits())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(MuonlabError, match=f"a CUDA graph cannot hold a step with {named}, a part of which"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert optimizer.steps_done == 0
