"""Two gloo processes: one reduction for all layers, the same clip on every rank, sharded weights.

The ranks run everything once and leave what they saw; the tests read it.
"""

import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from muonlab.layout import AttentionLayout, HeadRows
from muonlab.optim.qk_clip import QKClip

RANKS = 2
TAU = 20.0
# Per rank and layer, of which the second has two heads. The maximum over ranks clips heads (1, 0) and, by another
# rank's maximum, (0, 1).
MAXIMA = (
    [[40.0, 10.0, -3.0, 5.0], [1.0, 25.0, math.nan, math.nan]],
    [[15.0, 80.0, -9.0, 5.0], [21.0, 2.0, math.nan, math.nan]],
)


def layouts() -> list[AttentionLayout]:
    """GQA with biases and a fused MHA, the same on every rank; 14 fused rows halve inside a key head."""
    torch.manual_seed(0)
    q, q_bias, k = (nn.Parameter(torch.randn(shape)) for shape in ((12, 5), (12,), (6, 5)))
    fused = nn.Parameter(torch.randn(14, 5))
    return [
        AttentionLayout("layer_00", 4, 2, (HeadRows(q, 3), HeadRows(q_bias, 3)), (HeadRows(k, 3),)),
        AttentionLayout("layer_01", 2, 2, (HeadRows(fused, 2),), (HeadRows(fused, 2, offset=4),)),
    ]


def weights(of: list[AttentionLayout]) -> list[Tensor]:
    unique = {id(block.parameter): block.parameter for each in of for block in (*each.query, *each.key)}
    return [parameter.detach() for parameter in unique.values()]


def maxima(rank: int) -> Tensor:
    return torch.tensor(MAXIMA[rank])


def clip_once(of: list[AttentionLayout], observed: Tensor, **settings: Any) -> QKClip:
    qk_clip = QKClip(of, tau=TAU, **settings)
    qk_clip.observe(observed)
    qk_clip.apply(0)
    return qk_clip


def shard(of: list[AttentionLayout]) -> list[AttentionLayout]:
    """The same layouts over weights split over the ranks along dim 0."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, made = init_device_mesh("cpu", (RANKS,)), {}

    def sharded(block: HeadRows) -> HeadRows:
        whole = block.parameter
        part = made.setdefault(id(whole), nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)])))
        return HeadRows(part, block.rows, block.offset, block.stride, block.dim)

    return [
        AttentionLayout(
            each.name,
            each.num_heads,
            each.num_kv_heads,
            tuple(map(sharded, each.query)),
            tuple(map(sharded, each.key)),
        )
        for each in of
    ]


def fully_sharded() -> tuple[Tensor, Tensor]:
    """One FSDP2 step of a linear layer whose weight is clipped, and the same without sharding."""
    from torch.distributed.fsdp import fully_shard

    results = []
    for sharded in (True, False):
        torch.manual_seed(1)
        linear = nn.Linear(5, 10, bias=False)
        if sharded:
            fully_shard(linear)
        layout = AttentionLayout(
            "layer_00", 2, 2, (HeadRows(linear.weight, 2),), (HeadRows(linear.weight, 3, offset=4),)
        )
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
        linear(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        clip_once([layout], torch.tensor([[80.0, 10.0]]))
        weight = linear.weight
        results.append((weight.full_tensor() if sharded else weight).detach())
    return tuple(results)


def run_rank(rank: int, folder: str) -> None:
    """Everything that one rank does; what it saw goes to `folder`."""
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    reductions: list[tuple[tuple[int, ...], dist.ProcessGroup | None]] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reductions.append((tuple(tensor.shape), kwargs["group"]))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    seen: dict[str, Any] = {}
    plain = layouts()
    seen["gammas"] = clip_once(plain, maxima(rank)).gammas()
    seen["reductions"], seen["weights"] = list(reductions), weights(plain)
    swapped = layouts()
    clip_once(swapped, maxima(RANKS - 1 - rank))
    seen["swapped"] = weights(swapped)

    diverged = maxima(rank)
    if rank == 1:
        diverged[0] = torch.tensor([math.nan, 10.0, 10.0, 10.0])
    nan_clip = clip_once(layouts(), diverged)
    seen["diverged"] = (nan_clip.trace()["layer_00"]["max_logit"], nan_clip.gammas()[0])

    alone = [dist.new_group([each]) for each in range(RANKS)][rank]
    seen["alone"] = clip_once(layouts(), maxima(rank), process_group=alone).gammas()
    pair = dist.new_group(list(range(RANKS)))
    clip_once(layouts(), maxima(rank), process_group=pair)
    seen["reduced_in_the_group"] = reductions[-1][1] is pair
    seen["verified"] = nan_clip.verify(lambda: maxima(rank))

    parts = shard(layouts())
    clip_once(parts, maxima(rank))
    seen["local_shapes"] = [tuple(part.to_local().shape) for part in weights(parts)]
    seen["sharded"] = [part.full_tensor() for part in weights(parts)]
    seen["fsdp"] = fully_sharded()
    torch.save(seen, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.fixture
def whole() -> tuple[QKClip, list[Tensor]]:
    """One process that observed the micro-batches of both ranks."""
    alone = layouts()
    qk_clip = QKClip(alone, tau=TAU)
    for rank in range(RANKS):
        qk_clip.observe(maxima(rank))
    qk_clip.apply(0)
    return qk_clip, weights(alone)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_ranks_clip_as_one_process_with_both_batches_would(ranks, whole):
    qk_clip, expected = whole
    for seen in ranks:
        assert torch.equal(seen["gammas"], qk_clip.gammas())
        assert same(seen["weights"], expected)
    assert not same(expected, weights(layouts()))


def test_all_layers_go_over_the_ranks_in_one_reduction(ranks):
    """Megatron reduces layer by layer."""
    for seen in ranks:
        assert seen["reductions"] == [((6,), None)]


def test_the_order_of_ranks_changes_no_bit(ranks):
    for seen in ranks:
        assert same(seen["swapped"], seen["weights"])


def test_a_nan_on_one_rank_is_seen_by_all_and_clips_nothing(ranks):
    for seen in ranks:
        maximum, gamma = seen["diverged"]
        assert maximum.tolist() == [math.inf, 10, 10, 10]
        assert gamma.tolist() == [1, 1, 1, 1]


def test_ranks_with_other_heads_stay_out_of_the_process_group(ranks):
    assert all(seen["reduced_in_the_group"] for seen in ranks)
    torch.testing.assert_close(ranks[0]["alone"][0], torch.tensor([0.5, 1, 1, 1]))
    torch.testing.assert_close(ranks[1]["alone"][0], torch.tensor([1, 0.25, 1, 1]))


def test_verification_speaks_for_all_ranks(ranks):
    for seen in ranks:
        assert seen["verified"][0].tolist() == [2, 4, pytest.approx(-0.15), 0.25]


def test_megatron_7382_flat_shards_of_the_distributed_optimizer_break(ranks, whole):
    """Weights sharded across the middle of a head (DTensor, FSDP2) are clipped like whole ones."""
    _, expected = whole
    for seen in ranks:
        assert same(seen["sharded"], expected)
        assert seen["local_shapes"] == [(6, 5), (6,), (3, 5), (7, 5)]
        assert torch.equal(*seen["fsdp"])
