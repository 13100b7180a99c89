"""Two gloo processes do what one does, under every rule that is not Muon's: whole parameters (DDP), shards (FSDP2)."""

import multiprocessing
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from muonlab.optim import CombinedOptimizer
from muonlab.optim.ranks import spread_like, whole

RANKS, STEPS = 2, 4
MATRICES = ("soap", "soap_muon", "shampoo", "kl_shampoo", "scion")
ENTRIES = ("lion", "signum", "ademamix", "nadamw", "schedulefree_adamw")
# Uneven over two ranks, fewer rows than ranks, a stack, and heads; for the other rules also vectors.
SHAPES = ((7, 5), (1, 4), (3, 4, 6), (8, 6))
TABLES = ((5, 3), (4,), (1,))


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES + TABLES]


def optimizer(name, start):
    params = [nn.Parameter(each.clone()) for each in start]
    matrices, tables = params[: len(SHAPES)], params[len(SHAPES) :]
    if name in ENTRIES:
        return CombinedOptimizer(params, name), params
    rest = [{"params": tables, "rule": "adamw"}]
    if name == "scion":
        norms = ("sign", "rows", "rows")
        rest = [{"params": [p], "rule": "scion_table", "norm": n} for p, n in zip(tables, norms, strict=True)]
    heads = {"params": matrices[3:], "row_blocks": 4}
    return CombinedOptimizer([{"params": matrices[:3]}, heads, *rest], name), params


def train(of, params):
    """The whole parameters after the steps, and what evaluation reads."""
    for step in range(STEPS):
        for param, grad in zip(params, values(100 + step), strict=True):
            param.grad = spread_like(param, grad)
        of.step()
    trained = [whole(param).clone() for param in params]
    with of.averaged():
        return trained, [whole(param).clone() for param in params]


def run_rank(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    mesh, seen = init_device_mesh("cpu", (RANKS,)), {}
    for name in MATRICES + ENTRIES:
        replicated, params = optimizer(name, values(0))
        replicated.process_group = dist.group.WORLD
        seen["ddp", name] = train(replicated, params)
        split = [distribute_tensor(each, mesh, [Shard(0)], src_data_rank=None) for each in values(0)]
        seen["fsdp", name] = train(*optimizer(name, split))
    torch.save(seen, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("fork")  # nothing need be imported again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads at a fork
        processes = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(RANKS)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * RANKS
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", MATRICES + ENTRIES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_together_do_what_one_process_does(ranks, kind, name):
    alone = train(*optimizer(name, values(0)))
    # Newton-Schulz is fp32 on a CPU, whose last bits follow the size of a stack.
    tolerance = 1e-4 if name in ("scion", "soap_muon") else 1e-9
    for seen in ranks:
        for here, there in zip(seen[kind, name], alone, strict=True):
            for a, b in zip(here, there, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
