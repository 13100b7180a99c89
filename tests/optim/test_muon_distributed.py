"""Two and four gloo processes share the orthogonalisation, with whole parameters (DDP) and sharded ones (FSDP2).

The ranks are forked, run everything once and leave what they saw; the tests compare it with one process.
"""

import multiprocessing
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonlab.optim import Muon, muon_stages
from muonlab.optim.matrix_view import MatrixView
from muonlab.optim.ranks import deal, gathered, spread_like, whole, work

RANKS, STEPS = 4, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_nesterov": {"nesterov": False, "momentum_kind": "heavy_ball"},
    "corrected": {"momentum_kind": "ema_corrected", "scale_rule": "original"},
    "evened": {"before": ["equilibrate_rows"], "after": ["renormalise", "normuon"], "beta2": 0.9},
    "normuon_without_nesterov": {"after": ["normuon"], "nesterov": False, "scale_rule": "none"},
    "adamuon": {"before": ["sign"], "after": ["adamuon"]},
    "namo": {"after": ["namo"], "weight_decay": 0.1},
    "muon2": {"before": ["muon2", "aurora"]},
    "pmuon": {"before": ["pmuon"], "after": ["contra", "spectral_power"]},
    "hyperball": {"update_norm": "relative", "weight_norm": "fixed"},
    "braked": {"update_norm": "floor", "weight_norm": "brake", "weight_decay": 0.1, "cautious": True},
    "cautious": {"weight_decay": 0.1, "cautious": True, "weight_decay_kind": "independent"},
    "svd": {"ns_schedule": "svd", "weight_decay": 0.1, "scale_rule": "spectral"},
    "gram": {"ns_backend": "gram", "scale_rule": "spectral"},
}
# Shapes of one group each, with the view of the group: uneven over 2 or 4 ranks, fewer rows than ranks, every view.
GROUPS: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = [
    ([(7, 5), (3, 6), (16, 8), (8, 16), (1, 4)], {}),
    ([(16, 6), (12, 6)], {"row_blocks": 4}),
    ([(8, 6)], {"row_blocks": (4, 2, 2)}),
    ([(6, 8)], {"col_blocks": 2}),
    ([(5, 4, 6), (8, 3, 3)], {}),
    ([(3, 4, 6)], {"row_blocks": 2}),
    ([(6, 2, 3)], {"flatten": True}),
    ([(5,), (9, 3), (2,)], {"rule": "adamw"}),
]


def tensors(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=dtype) for shapes, _ in GROUPS for s in shapes]


def optimizer(values: list[Tensor], **settings: Any) -> Muon:
    rest = iter(values)
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(next(rest).clone()) for _ in shapes], **view} for shapes, view in GROUPS
    ]
    return Muon(groups, lr=0.1, **settings)


def parameters(of: Muon) -> list[Tensor]:
    return [param for group in of.param_groups for param in group["params"]]


def train(of: Muon, first: int = 0) -> list[Tensor]:
    """Steps by gradients that every rank has alike, sharded as the parameters are; the whole parameters after them."""
    for step in range(first, first + STEPS):
        for param, grad in zip(parameters(of), tensors(100 + step, torch.float64), strict=True):
            param.grad = spread_like(param, grad.to(param.dtype))
        of.step()
    return [whole(param).clone() for param in parameters(of)]


def sharded(values: list[Tensor], mesh: Any) -> list[Tensor]:
    from torch.distributed.tensor import Shard, distribute_tensor

    return [distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None) for value in values]


def count_matrices(of: Muon) -> tuple[list[Tensor], int]:
    """The parameters after `train`, and how many matrices this process orthogonalised."""
    counted, original = 0, muon_stages.orthogonalise

    def counting(stacks: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
        nonlocal counted
        counted += sum(stack.shape[:-2].numel() for stack in stacks)
        return original(stacks, *args, **kwargs)

    muon_stages.orthogonalise = counting
    try:
        return train(of), counted
    finally:
        muon_stages.orthogonalise = original


def two_matrices(process_group: Any = None) -> list[Tensor]:
    """Two matrices of different scales after a step, half the ranks having none of them."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 3), (4, 5))
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    optimizer = Muon(params, lr=0.1)
    optimizer.process_group = process_group
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
    optimizer.step()
    return [param.detach() for param in params]


def run_rank(rank: int, folder: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "ranks"))["ranks"]
    meshes = {2: pairs, RANKS: init_device_mesh("cpu", (RANKS,))}
    start, seen = tensors(0, torch.float64), {}
    for world, mesh in meshes.items():
        for name, settings in SETTINGS.items():
            replicated = optimizer(start, ns_dtype="float64", **settings)
            replicated.process_group = mesh.get_group()
            seen["ddp", world, name] = count_matrices(replicated)
            split = optimizer(sharded(start, mesh), ns_dtype="float64", **settings)
            seen["fsdp", world, name] = count_matrices(split)
        seen["state", world] = gathered(split.state_dict(), keep=rank == 0)
        half = optimizer(sharded(tensors(0, torch.bfloat16), mesh))
        seen["bf16", world] = train(half)
    # A whole state, saved by four ranks with NorMuon's moments, resumes on two.
    evened = {"ns_dtype": "float64", **SETTINGS["evened"]}
    four = optimizer(sharded(start, meshes[RANKS]), **evened)
    after = train(four)
    state = gathered(four.state_dict())
    two = optimizer(sharded(after, pairs), **evened)
    two.load_state_dict(state)
    seen["moved"] = train(two, first=STEPS)
    seen["saved"] = (after, state)
    seen["few"] = two_matrices(dist.group.WORLD)
    torch.save(seen, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
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


def close(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("world", [2, RANKS])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_together_do_what_one_process_does_and_no_matrix_twice(ranks, kind, world, name):
    expected, alone = count_matrices(
        optimizer(tensors(0, torch.float64), ns_dtype="float64", **SETTINGS[name])
    )
    for seen in ranks:
        after, _ = seen[kind, world, name]
        close(after, expected)
        assert all(torch.equal(a, b) for a, b in zip(after, ranks[0][kind, world, name][0], strict=True))
    counts = [seen[kind, world, name][1] for seen in ranks[:world]]
    assert sum(counts) == alone
    assert min(counts) > 0


def test_a_rank_may_have_no_matrix(ranks):
    for seen in ranks:
        close(seen["few"], two_matrices())


@pytest.mark.parametrize("world", [2, RANKS])
def test_bf16_shards_are_updated_in_fp32_and_rounded_once(ranks, world):
    expected = train(optimizer(tensors(0, torch.bfloat16)))
    for seen in ranks:
        close(
            seen["bf16", world], expected, tolerance=1e-2
        )  # an update's last bit of fp32 may turn one of bf16


def test_the_state_of_shards_is_that_of_one_process(ranks):
    alone = optimizer(tensors(0, torch.float64), ns_dtype="float64", **SETTINGS["gram"])
    train(alone)
    for world in (2, RANKS):
        state = ranks[0]["state", world]
        assert state["steps_done"] == STEPS
        for i, entries in alone.state_dict()["state"].items():
            assert state["state"][i].keys() == entries.keys()
            for name, value in entries.items():
                torch.testing.assert_close(state["state"][i][name], value, rtol=1e-12, atol=1e-12)


def test_a_state_resumes_on_another_number_of_ranks_and_in_one_process(ranks):
    evened = {"ns_dtype": "float64", **SETTINGS["evened"]}
    expected = optimizer(tensors(0, torch.float64), **evened)
    train(expected)
    final = train(expected, first=STEPS)
    after, state = ranks[0]["saved"]
    alone = optimizer(after, **evened)
    alone.load_state_dict(state)
    close(train(alone, first=STEPS), final)
    for seen in ranks:
        close(seen["moved"], final)


def test_work_is_dealt_out_by_cost():
    shapes = tuple(torch.Size(s) for s in [(512, 512)] * 4 + [(512, 2048)] * 2 + [(2048, 512)] * 2)
    views = (MatrixView(),) * len(shapes)
    costs = [work(shape, view) for shape, view in zip(shapes, views, strict=True)]
    for world in (2, 4):
        load = [0] * world
        for run in deal(shapes, views, world, False):
            load[run.owner] += costs[run.param]
        assert max(load) <= 1.01 * sum(costs) / world


@pytest.mark.parametrize("sharded", [False, True])
def test_experts_stay_where_they_are_and_are_dealt_out_evenly(sharded):
    runs = deal((torch.Size((8, 16, 32)),), (MatrixView(),), 4, sharded)
    assert [(run.start, run.stop) for run in runs] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert sorted(run.owner for run in runs) == [0, 1, 2, 3]
    if sharded:
        assert [run.owner for run in runs] == [0, 1, 2, 3]
