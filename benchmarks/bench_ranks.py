"""Muon's step on ranks that share the orthogonalisation, as a ratio to ranks that each do all of it.

    python benchmarks/bench_ranks.py [ranks] [width] [layers]

Gloo processes with one thread each; the cores of this machine bound what can be gained.
"""

import os
import statistics
import sys
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from muonlab.optim import Muon

REPEATS = 7


def run_rank(rank: int, ranks: int, width: int, layers: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    torch.manual_seed(0)
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    params = [nn.Parameter(torch.randn(shape)) for _ in range(layers) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Muon(params)
    times: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(REPEATS + 1):
        for shared in times:  # in turn, so that a busy machine slows both
            optimizer.process_group = dist.group.WORLD if shared else None
            dist.barrier()
            start = time.perf_counter()
            optimizer.step()
            dist.barrier()
            if repeat:
                times[shared].append(time.perf_counter() - start)
    if rank == 0:
        alone, together = (statistics.median(times[shared]) for shared in (False, True))
        print(
            f"{ranks} ranks, {layers} layers of width {width}: each does all {1e3 * alone:.0f} ms, "
            f"shared {1e3 * together:.0f} ms, ratio {together / alone:.2f}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks, width, layers = (int(given) for given in [*sys.argv[1:], *["2", "384", "6"][len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (ranks, width, layers, f"{folder}/store"), nprocs=ranks)
