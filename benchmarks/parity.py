"""Train matrices with the public optimizers and with ours, and write down the difference.

Run by `make parity` in an environment of its own. Ours is Muon under `parity(name)` for the Muons, and the rule of the
same name for the others (parity_rules.py). Two comparisons a package and shape: as it ships, with the
rounding of its own work dtype, and in fp64 with its casts to fewer bits taken away, where the equations alone
are left. A difference is that of the weights after STEPS steps, over how far the package's have moved.
"""

import csv
import importlib.metadata
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The packages compile at import; run eagerly, their casts can be seen and exchanged.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from muonlab.optim import Muon
from muonlab.optim.parity import parity

STEPS = 10
LR = 0.02
SHAPES = ((64, 64), (160, 64), (64, 160))
NARROW = (torch.bfloat16, torch.float16, torch.float32)
RESULTS = Path(__file__).parents[1] / "results" / "parity"

Training = Callable[[Tensor, list[Tensor]], Tensor]


class EverythingInDouble(TorchFunctionMode):
    """Casts to bf16, fp16 and fp32 give fp64 instead, in copies where the cast would have copied."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.float):
            return args[0].to(torch.float64, copy=True)
        args = tuple(torch.float64 if _narrow(arg) else arg for arg in args)
        return function(*args, **{k: torch.float64 if _narrow(v) else v for k, v in kwargs.items()})


def _narrow(value: object) -> bool:
    return isinstance(value, torch.dtype) and value in NARROW


def with_torch(build: Callable[[nn.Parameter], torch.optim.Optimizer]) -> Training:
    """Weights after training one matrix with a torch optimizer."""

    def train(weight: Tensor, grads: list[Tensor]) -> Tensor:
        param = nn.Parameter(weight.clone())
        optimizer = build(param)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        return param.detach().to(weight.dtype)

    return train


def with_optax(weight: Tensor, grads: list[Tensor]) -> Tensor:
    """optax.contrib.muon; its matrices are (in, out)."""
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    params = {"w": jnp.asarray(weight.T.numpy())}
    muon = optax.contrib.muon(LR)
    state = muon.init(params)
    for grad in grads:
        updates, state = muon.update({"w": jnp.asarray(grad.T.numpy())}, state, params)
        params = optax.apply_updates(params, updates)
    return torch.tensor(jax.device_get(params["w"])).T.to(weight.dtype)


def gram_newton_schulz(param: nn.Parameter) -> torch.optim.Optimizer:
    from gram_newton_schulz import Muon as Theirs

    return Theirs([param], lr=LR, ns_use_kernels=False, gram_newton_schulz_restart_iterations=[2])


def heavyball(param: nn.Parameter) -> torch.optim.Optimizer:
    import heavyball as package

    package.utils.compile_mode = None
    return package.Muon([param], lr=LR, heavyball_momentum=True)


def with_muon_fsdp2(weight: Tensor, grads: list[Tensor]) -> Tensor:
    """Sharded over one rank, for the single-device path of 0.3.0 calls a function that is not there."""
    import torch.distributed as dist
    from muon_fsdp2 import Muon as Theirs
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    param = nn.Parameter(distribute_tensor(weight.clone(), mesh, [Shard(0)]))
    optimizer = Theirs([{"params": [param], "use_muon": True, "lr": LR}])
    for grad in grads:
        param.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)])
        optimizer.step()
    return param.detach().to_local()


def muonium(param: nn.Parameter) -> torch.optim.Optimizer:
    from muonium import Muon as Theirs
    from muonium.orthogonalize import polar_express

    # Its Triton kernel, X Xᵀ, needs a GPU; the product stands in for it.
    polar_express.gram_ = lambda X, out: out.copy_(X @ X.mT)
    return Theirs([param], lr=LR)


def pytorch_optimizer(param: nn.Parameter) -> torch.optim.Optimizer:
    from pytorch_optimizer import Muon as Theirs

    return Theirs([{"params": [param], "use_muon": True}], lr=LR)


@dataclass(frozen=True)
class Comparison:
    """A rule of ours, a package's, and the shapes (rows, cols) on which they are compared."""

    rule: str
    implementation: str
    distribution: str
    ours: Training
    theirs: Training
    shapes: tuple[tuple[int, int], ...] = SHAPES


def muon(name: str, theirs: Training, distribution: str = "") -> Comparison:
    """Ours under `parity(name)`."""
    ours = with_torch(lambda param: Muon([param], lr=LR, **parity(name)))
    return Comparison("muon", name, distribution or name, ours, theirs)


MUONS = (
    muon("torch", with_torch(lambda param: torch.optim.Muon([param], lr=LR))),
    muon("optax", with_optax),
    muon("gram_newton_schulz", with_torch(gram_newton_schulz), "gram-newton-schulz"),
    muon("heavyball", with_torch(heavyball)),
    muon("muon_fsdp2", with_muon_fsdp2, "muon-fsdp2"),
    muon("muonium", with_torch(muonium)),
    muon("pytorch_optimizer", with_torch(pytorch_optimizer)),
)


def difference(comparison: Comparison, shape: tuple[int, int], double: bool) -> float:
    """|ours - theirs| over the distance that theirs moved, in Frobenius norms."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    weight, *grads = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(STEPS + 1))
    ours = comparison.ours(weight, grads)
    if double:
        with EverythingInDouble():
            theirs = comparison.theirs(weight, grads)
    else:
        theirs = comparison.theirs(weight, grads)
    return ((ours - theirs).norm() / (theirs - weight).norm()).item()


def main() -> int:
    """Print the table, write it to results/parity and return 1 if an implementation is not equal in fp64."""
    from parity_rules import OTHERS

    torch.manual_seed(0)  # heavyball rounds at random
    rows = []
    for comparison in (*MUONS, *OTHERS):
        for shape in comparison.shapes:
            row = {
                "rule": comparison.rule,
                "implementation": comparison.implementation,
                "version": importlib.metadata.version(comparison.distribution),
                "rows": shape[0],
                "cols": shape[1],
                "steps": STEPS,
                "difference_fp64": f"{difference(comparison, shape, double=True):.1e}",
                "difference_as_shipped": f"{difference(comparison, shape, double=False):.1e}",
            }
            rows.append(row)
            print("  ".join(f"{value!s:<18}" for value in row.values()).rstrip(), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "parity.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unequal = {
        f"{row['rule']} of {row['implementation']}" for row in rows if float(row["difference_fp64"]) > 1e-6
    }
    if unequal:
        print(f"not equal in fp64: {', '.join(sorted(unequal))}", file=sys.stderr)
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
