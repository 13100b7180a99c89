"""The mixture of experts as a whole: its layer, its loads and measurements, resume, compiling, several ranks."""

import copy
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from muonlab.errors import MuonlabError
from muonlab.models import build_model, model_counts
from muonlab.models.router import normalised_scores
from muonlab.optim import build_optimizer

SETTINGS = dict(
    vocab_size=61, context=16, d_model=16, num_layers=3, dense_hidden=24, num_experts=6, expert_hidden=8
)
ASSIGNED = 3 * 16 * 2  # tokens of a batch, times experts a token


def moe(seed=0, **settings):
    torch.manual_seed(seed)
    return build_model("moe", **SETTINGS | settings)


def tokens(seed=0, batch=3):
    return torch.randint(61, (batch, 16), generator=torch.Generator().manual_seed(seed))


def expert_outputs(layer, x):
    """shared(x) and every routed expert's output, (T, D) and (T, E, D), as they are written."""
    e = layer.experts
    hidden = nn.functional.silu(torch.einsum("ehd,td->teh", e.gate, x)) * torch.einsum("ehd,td->teh", e.up, x)
    shared = layer.shared.down(nn.functional.silu(layer.shared.gate(x)) * layer.shared.up(x))
    return shared, torch.einsum("edh,teh->ted", e.down, hidden)


def test_a_layer_equals_one_token_at_a_time_with_gradients():
    layer = moe(routed_scaling=1.7).double().blocks[1].mlp
    with torch.no_grad():
        layer.router.balance_bias.copy_(torch.linspace(-0.1, 0.1, 6))
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    shared, routed = expert_outputs(layer, x.flatten(0, 1))
    slow = []
    for t, token in enumerate(x.flatten(0, 1)):
        scores = (layer.router.weight @ token).sigmoid()
        best = (scores + layer.router.balance_bias).topk(2).indices.tolist()
        total = sum(scores[e] for e in best)
        slow.append(shared[t] + sum(1.7 * scores[e] / total * routed[t, e] for e in best))
    slow = torch.stack(slow).view_as(x)
    fast = layer(x)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    inputs, direction = [x, *layer.parameters()], torch.randn_like(slow)
    for ours, expected in zip(
        *(torch.autograd.grad(out, inputs, direction) for out in (fast, slow)), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_loads_are_those_of_the_step_and_none_is_dropped():
    model = moe()
    model(tokens())
    first = model.expert_loads()
    assert first.shape == (2, 6)
    assert first.sum(1).tolist() == [ASSIGNED] * 2
    model.eval()
    model(tokens(1))
    assert torch.equal(model.expert_loads(), first)  # an evaluation adds no load
    model.train()
    model(tokens(1))  # a second micro-batch
    both = model.expert_loads()
    assert both.sum(1).tolist() == [2 * ASSIGNED] * 2
    model.update_balance()
    assert torch.equal(model.expert_loads(), both)  # those of the step that ended
    bias = torch.stack([layer.router.balance_bias for layer in model.expert_layers.values()])
    torch.testing.assert_close(bias, 1e-3 * (both.mean(1, keepdim=True) - both).sign())
    model(tokens())
    assert model.expert_loads().sum(1).tolist() == [ASSIGNED] * 2


def test_measurements_are_what_they_say():
    model = moe()
    with pytest.raises(MuonlabError, match="training mode"):
        model.measurements()
    seen = {}
    for i, layer in model.expert_layers.items():
        layer.register_forward_hook(lambda layer, inputs, out, i=i: seen.update({i: (inputs[0], out)}))
    model(tokens(), tokens(1)).loss.backward()
    measured = model.measurements()
    assert len(measured) == 2 * 5
    assert all(value.ndim == 0 and not value.requires_grad for value in measured.values())
    for (i, layer), loads in zip(model.expert_layers.items(), model.expert_loads(), strict=True):
        x, out = seen[i][0].flatten(0, 1), seen[i][1].flatten(0, 1)
        logits, shared = x @ layer.router.weight.T, expert_outputs(layer, x)[0]
        p = normalised_scores(logits)
        for what, expected in {
            "balance/violation": loads.max() / loads.mean() - 1,
            "router/entropy": -(p * p.log()).sum(1).mean(),
            "router/max_logit": logits.max(),
            "experts/shared_norm": shared.square().mean().sqrt(),
            "experts/routed_norm": (out - shared).square().mean().sqrt(),
        }.items():
            torch.testing.assert_close(measured[f"{what}/layer_{i:02d}"], expected.detach())
        assert measured[f"router/entropy/layer_{i:02d}"] <= math.log(6) + 1e-6


def test_the_balance_loss_is_added_in_training_alone():
    model = moe(balance="loss", balance_loss=0.5)
    out = model(tokens(), tokens(1))
    assert 2 * 0.5 * 0.9 < out.loss - out.cross_entropy < 2 * 0.5 * 6  # two layers, 0.5 each at balance
    out.loss.backward()
    plain = moe(balance="none")
    plain(tokens(), tokens(1)).loss.backward()
    for ours, theirs in zip(model.expert_layers.values(), plain.expert_layers.values(), strict=True):
        assert not torch.equal(ours.router.weight.grad, theirs.router.weight.grad)
    out = model.eval()(tokens(), tokens(1))
    assert torch.equal(out.loss, out.cross_entropy)


def test_sparsity_adds_experts_and_leaves_active_parameters_but_for_the_router():
    few, many = (model_counts(moe(sparsity=sparsity).settings, 16) for sparsity in (2, 8))
    assert many["routed"].parameters == 4 * few["routed"].parameters
    assert all(few[part].active == many[part].active for part in few if part != "router")


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(tokens(step), tokens(step + 100)).loss.backward()
        optimizer.observe(model.max_logits())
        optimizer.step()
        model.update_balance()


def test_resume_is_bitwise():
    straight, resumed = moe(balance_speed=0.05), moe(seed=1, balance_speed=0.05)
    optimizer, other = (build_optimizer("muonclip", model, tau=0.5) for model in (straight, resumed))
    train(straight, optimizer, range(3))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_muon_takes_every_stack_as_one_batch_and_adamw_the_routers():
    routes = {route.name: route for route in build_optimizer("muonclip", moe(q_lora_rank=8)).routing}
    stacks = [r for name, r in routes.items() if ".experts." in name]
    assert len(stacks) == 6
    assert {(r.rule, r.view) for r in stacks} == {("muon", "6 of 8 x 16"), ("muon", "6 of 16 x 8")}
    assert {r.rule for name, r in routes.items() if "router" in name} == {"adamw"}
    attention = [r for name, r in routes.items() if ".attention." in name and "norm" not in name]
    assert len(attention) == 3 * 8
    assert {r.rule for r in attention} == {"muon"}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # within torch.compile
def test_compiled_equals_eager_in_one_graph():
    # aot_eager traces forward and backward as every backend does, and generates no code.
    eager = moe(num_layers=1, num_dense_layers=0)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for model in (eager, compiled):
        model(tokens(), tokens(1)).loss.backward()
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert torch.equal(eager.expert_loads(), compiled.expert_loads())
    assert eager.state_dict().keys() == compiled.state_dict().keys()


def test_bf16_autocast_trains_near_fp32():
    model = moe()
    exact = model(tokens(), tokens(1)).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens(), tokens(1)).loss
    rounded.backward()
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=0)
    assert all(p.grad.isfinite().all() and p.grad.dtype is torch.float32 for p in model.parameters())


def run_rank(rank, folder):
    """Two micro-batches under DistributedDataParallel, this rank's half of each, and the end of the step."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    parallel = nn.parallel.DistributedDataParallel(moe())
    for micro in range(2):
        parallel(tokens(micro, batch=4)[rank::2], tokens(micro + 9, batch=4)[rank::2]).loss.backward()
    model = parallel.module
    model.update_balance()
    torch.save((model.expert_loads(), model.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_sum_their_loads_and_agree_on_the_bias(tmp_path):
    mp.start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    alone = moe()
    for micro in range(2):
        alone(tokens(micro, batch=4))
    alone.update_balance()
    for rank in range(2):
        loads, state = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(loads, alone.expert_loads())
        for name, bias in alone.named_buffers():
            if name.endswith("balance_bias"):
                assert torch.equal(state[name], bias)
