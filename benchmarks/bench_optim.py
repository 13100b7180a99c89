"""Time of one Muon step: ours against public implementations and against the floor of its matrix products.

    python benchmarks/bench_optim.py [--sets d64_L6 ...] [--threads 1 2] [--repeats 15] [--csv FILE]

Every arm steps the same matrices with the same gradients. Arms take turns within a repeat, so that what else
the machine does falls on all of them; the table gives medians, and the ratio to torch.optim.Muon in the same
run. "floor" is the time that the products of the form used would take at the rate measured for products of
those very shapes. Packages that are not installed are listed as such.
"""

import argparse
import csv
import importlib.metadata
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from muonlab.models import build_model
from muonlab.optim import Muon, build_optimizer
from muonlab.optim.backend import bf16_unit, choose_backend, count_products
from muonlab.optim.schedules import resolve_schedule

LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.95, 0.1
ROWS = resolve_schedule("jordan").rows


def transformer(d: int, layers: int) -> list[tuple[int, ...]]:
    """Query, key, value, output and a fourfold MLP per layer, as (rows, cols)."""
    return [(d, d)] * 4 * layers + [(4 * d, d), (d, 4 * d)] * layers


PARAMETER_SETS: dict[str, list[tuple[int, ...]]] = {
    "d64_L6": transformer(64, 6),
    "d128_L4": transformer(128, 4),
    "d384_L6": transformer(384, 6),
    # d=128, 4 layers, 8 experts a layer stored as stacks, as in muonlab's own mixture of experts
    "moe_8_experts": [(128, 128)] * 16 + [(8, 256, 128), (8, 128, 256)] * 4,
    # GPT-2 small has 12 layers with a fused QKV matrix; one of them, since all cost the same
    "gpt2_small_1_layer": [(2304, 768), (768, 768), (3072, 768), (768, 3072)],
}


class KellerJordan(torch.optim.Optimizer):
    """Keller Jordan's rule, plainly: a loop over parameters, five Newton-Schulz steps with two temporaries
    each.

    M <- 0.95 M + 0.05 G; D = 0.05 G + 0.95 M; W <- (1 - lr wd) W - lr sqrt(max(1, rows / cols)) NS5(D).
    """

    def __init__(self, params: list[nn.Parameter], dtype: torch.dtype):
        super().__init__(params, {})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for param in self.param_groups[0]["params"]:
            buffer = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
            buffer.lerp_(param.grad, 1 - MOMENTUM)
            X = param.grad.lerp(buffer, MOMENTUM).to(self.dtype)
            wide = X.size(-2) <= X.size(-1)
            X = X if wide else X.mT
            X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for a, b, c in ROWS:
                A = X @ X.mT
                X = a * X + (b * A + c * A @ A) @ X
            X = X if wide else X.mT
            param.mul_(1 - LR * WEIGHT_DECAY)
            param.add_(X, alpha=-LR * max(1, param.size(-2) / param.size(-1)) ** 0.5)


def ours(dtype: str, backend: str = "auto") -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return Muon(params, lr=LR, weight_decay=WEIGHT_DECAY, ns_dtype=dtype, ns_backend=backend)

    return build


def torch_muon(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, lr=LR, weight_decay=WEIGHT_DECAY)


def gram_newton_schulz(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from gram_newton_schulz import Muon as Theirs

    return Theirs(params, lr=LR, ns_use_kernels=False, gram_newton_schulz_restart_iterations=[2])


def heavyball(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    import heavyball as package

    return package.Muon(params, lr=LR)


# name, distribution that it needs, builder
ARMS: list[tuple[str, str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = [
    ("torch.optim.Muon (bf16)", "torch", torch_muon),
    ("muonlab fp32", "torch", ours("float32")),
    ("muonlab fp32, plain form", "torch", ours("float32", "plain")),
    ("muonlab bf16", "torch", ours("bfloat16")),
    ("Keller Jordan's rule fp32", "torch", lambda params: KellerJordan(params, torch.float32)),
    ("Keller Jordan's rule bf16", "torch", lambda params: KellerJordan(params, torch.bfloat16)),
    ("gram-newton-schulz (fp16)", "gram-newton-schulz", gram_newton_schulz),
    ("heavyball Muon", "heavyball", heavyball),
]


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def parameters(shapes: list[tuple[int, ...]], stacks: bool) -> list[nn.Parameter]:
    """Parameters with gradients; without `stacks` every expert is a matrix of its own, as others need it."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes:
        weight, grad = (torch.randn(shape, generator=generator) for _ in range(2))
        pairs = [(weight, grad)] if stacks or len(shape) == 2 else list(zip(weight, grad, strict=True))
        for value, slope in pairs:
            param = nn.Parameter(value.clone())
            param.grad = slope.clone()
            found.append(param)
    return found


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    return statistics.median(seconds(call) for _ in range(repeats))


def floor(shapes: list[tuple[int, ...]], repeats: int) -> float:
    """Seconds that the products of our fp32 step take at this machine's rate for products of their shapes.

    A product with a symmetric result counts with the entries that the form used really computes.
    """
    matrices = Counter()
    for shape in shapes:
        matrices[tuple(sorted(shape[-2:]))] += shape[0] if len(shape) == 3 else 1
    total = 0.0
    for (n, m), count in matrices.items():
        chosen = choose_backend(n, m, ROWS, torch.float32, "cpu")
        share = (1 + chosen.strip / n) / 2 if chosen.strip else 1.0
        long, short = count_products(ROWS, chosen.form, torch.float32)
        stack = min(chosen.stack or count, count)
        X, A = torch.randn(stack, m, n), torch.randn(stack, n, n)
        XA, AA = torch.empty_like(X), torch.empty_like(A)
        per_long = median_seconds(lambda: torch.bmm(X, A, out=XA), repeats) / stack  # noqa: B023
        per_short = median_seconds(lambda: torch.bmm(A, A, out=AA), repeats) / stack  # noqa: B023
        total += count * (per_long * long * (1 + share) / 2 + per_short * short * share)
    return total


def measure(name: str, threads: int, repeats: int) -> list[dict[str, object]]:
    """One row an arm: median milliseconds, spread, and ratios."""
    torch.set_num_threads(threads)
    shapes = PARAMETER_SETS[name]
    arms: dict[str, tuple[torch.optim.Optimizer, list[nn.Parameter], list[Tensor]]] = {}
    for arm, distribution, build in ARMS:
        if installed(distribution):
            params = parameters(shapes, stacks=arm.startswith("muonlab"))
            arms[arm] = build(params), params, [param.grad.clone() for param in params]
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    floors: list[float] = []
    for repeat in range(repeats + 2):
        for arm, (optimizer, params, grads) in arms.items():
            # some optimizers overwrite gradients, some take them away
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            duration = seconds(optimizer.step)
            if repeat >= 2:  # state is made and code compiled in the first
                times[arm].append(duration)
        floors.append(floor(shapes, 5))
    baseline = statistics.median(times[ARMS[0][0]])
    times["floor of muonlab fp32"] = floors
    rows = []
    for arm in [arm for arm, _, _ in ARMS] + ["floor of muonlab fp32"]:
        row: dict[str, object] = {"set": name, "threads": threads, "arm": arm}
        if arm in times:
            median = statistics.median(times[arm])
            row |= {
                "median_ms": round(1e3 * median, 3),
                "fastest_ms": round(1e3 * min(times[arm]), 3),
                "to_torch": round(median / baseline, 3),
                "to_floor": round(median / statistics.median(floors), 2),
            }
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    print(f"\n{rows[0]['set']}, {rows[0]['threads']} thread(s)")
    print(f"  {'arm':<28}{'median ms':>11}{'fastest ms':>12}{'/ torch':>9}{'/ floor':>9}")
    for row in rows:
        if "median_ms" in row:
            cells = f"{row['median_ms']:>11}{row['fastest_ms']:>12}{row['to_torch']:>9}{row['to_floor']:>9}"
        else:
            cells = f"{'not installed':>14}"
        print(f"  {row['arm']:<28}{cells}", flush=True)


def print_clip_cost(repeats: int) -> None:
    """QK-Clip with every head clipped, against the whole training step of the smallest model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model("nanogpt", vocab_size=256, context=64, d_model=64, num_layers=6, num_heads=2)
    optimizer = build_optimizer("muonclip", model)
    tokens = torch.randint(256, (32, 64))
    maxima = torch.full((6, 2), 100.001)
    steps, clips = [], []

    def train() -> None:
        optimizer.zero_grad()
        model(tokens, tokens).loss.backward()
        optimizer.observe(model.max_logits())
        optimizer.step()

    def clip() -> None:
        optimizer.clip.observe(maxima)
        optimizer.clip.apply(optimizer.steps_done)

    for _ in range(repeats):
        steps.append(seconds(train))
        clips.append(seconds(clip))
    step, clipped = statistics.median(steps), statistics.median(clips)
    print(
        f"\nQK-Clip, all 12 heads of d=64, L=6 clipped: {1e3 * clipped:.3f} ms, "
        f"{clipped / step:.1%} of a training step of 32 x 64 tokens ({1e3 * step:.1f} ms)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=PARAMETER_SETS, default=list(PARAMETER_SETS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "not limited")
    print(f"torch {torch.__version__}, bf16 unit: {bf16_unit() or 'none'}, ONEDNN_MAX_CPU_ISA: {isa}")
    rows = []
    for threads in args.threads:
        for name in args.sets:
            # the largest sets take seconds a step
            repeats = max(3, args.repeats // 3) if name.startswith(("gpt2", "d384")) else args.repeats
            rows += (table := measure(name, threads, repeats))
            print_table(table)
    print_clip_cost(args.repeats)
    if args.csv:
        fields = ["set", "threads", "arm", "median_ms", "fastest_ms", "to_torch", "to_floor"]
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
