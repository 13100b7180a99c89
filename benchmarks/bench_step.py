"""python benchmarks/bench_step.py [model ...]: what a training step costs, as ratios within one run.

Interleaved repeats on one thread; medians over repeats, with their range. Read it on an idle machine. For every model:

    nanoGPT       the unit: a bare model of the same sizes under torch's AdamW, eager (benchmarks/plain_gpt.py)
    dense         the unit for a mixture of experts: our bare loop of a dense model of as many active parameters
    bare loop     our model, MuonClip, the batches, exact max logits, and nothing else
    no maxima     the bare loop without measuring max logits
    AdamW         the same under AdamW
    recorded      a Lightning step with every trace, probe, checkpoint and MLflow, under MuonClip
    recorded AdamW
    compiled      bare and recorded under torch.compile, with --compile, since compiling takes from seconds to minutes
    products      the matrix products of forward and backward alone, at their own shapes: the floor of every variant
    allocator     glibc's default, which returns freed memory; two threads; both in processes of their own

with tokens per second, the share of the machine's measured fp32 matrix-product peak that the model's FLOPs reach, the
parts of a step, and the peak resident memory of the bare loop's process.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_gpt import PlainLoop, seconds_each
from torch.utils._python_dispatch import TorchDispatchMode

import muonlab.models.experts  # noqa: F401, registers grouped_mm
from muonlab.cli import compose_config, plain
from muonlab.models import NanoGPT, build_model, model_counts
from muonlab.models.counts import total
from muonlab.optim.optimizers import OPTIMIZERS
from muonlab.runtime import settle
from muonlab.settings.model import with_vocabulary
from muonlab.train.config import RunConfig, read_config

MODELS = ["nanogpt_xs", "nanogpt_s", "nanogpt_m", "moe_xs"]
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default}
PRODUCTS |= {torch.ops.muonlab.grouped_mm.default}
PERIOD = 25
PARTS = ("data", "forward", "backward", "optimizer", "clip")


def config(model: str, folder: str, *overrides: str) -> RunConfig:
    """A run of `model` with muonclip and everything that is recorded by default."""
    paths = [f"paths.runs={folder}", "trainer.progress=false", "trainer.val_every=0"]
    return read_config(plain(compose_config("train", [f"model={model}", *paths, *overrides])))


class BareLoop:
    """A model, its optimizer and batches with nothing around them; `parts` adds up seconds by part of the step."""

    def __init__(self, settings: RunConfig, model: torch.nn.Module | None = None, maxima: bool = True):
        from muonlab.data import make_data
        from muonlab.train.module import LanguageModel

        self.settings = settings
        self.data = make_data(settings.data, settings.paths.cache)
        torch.manual_seed(settings.seed)
        module = LanguageModel(settings, self.data)
        self.model, self.optimizer = module.model, module.optimizer
        if model is not None:
            self.model, self.optimizer = model, OPTIMIZERS.make(settings.optimizer, model)
        self.maxima = torch.empty(0)
        if not maxima:
            self.model(*self.data.batch(1, 0, module.batch_size, module.context))
            self.maxima = self.model.max_logits()
            self.model.eval()
        self.batch_size, self.context = module.batch_size, module.context
        self.index, self.parts = 0, dict.fromkeys(PARTS, 0.0)
        self._time_the_clip()

    def _time_the_clip(self) -> None:
        if self.optimizer.clip is None:
            return
        act = self.optimizer.clip.apply

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = act(*arguments)
            seconds = time.perf_counter() - started
            self.parts["clip"] += seconds
            self.parts["optimizer"] -= seconds
            return result

        self.optimizer.clip.apply = timed

    def steps(self, count: int) -> float:
        """Seconds a step over `count` steps."""
        return seconds_each(self._step, count)

    def _step(self) -> None:
        clock = [time.perf_counter()]
        tokens, targets = self.data.batch(1, self.index, self.batch_size, self.context)
        self.index += 1
        clock.append(time.perf_counter())
        loss = self.model(tokens, targets).loss
        clock.append(time.perf_counter())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clock.append(time.perf_counter())
        self.optimizer.observe(self.model.max_logits() if self.model.training else self.maxima)
        self.optimizer.step()
        clock.append(time.perf_counter())
        for part, a, b in zip(PARTS, clock, clock[1:], strict=False):
            self.parts[part] += b - a


def dense_twin(settings: RunConfig) -> BareLoop:
    """A NanoGPT as deep and wide as the mixture, whose MLPs make its parameters the mixture's active ones."""
    wanted = with_vocabulary(settings.model)
    shared = {key: getattr(wanted, key) for key in ("context", "d_model", "num_layers", "num_heads")}

    def dense(hidden: float) -> NanoGPT:
        return build_model("nanogpt", mlp_ratio=hidden / wanted.d_model, activation="swiglu", **shared)

    def active(hidden: float) -> float:
        return total(model_counts(dense(hidden).settings, wanted.context).values()).active

    goal = total(model_counts(wanted).values()).active
    return BareLoop(settings, dense(round(1 + (goal - active(1)) / (active(2) - active(1)))))


class _Products(TorchDispatchMode):
    """Remembers every matrix product that runs beneath it, to repeat them without what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in PRODUCTS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Products:
    """The matrix products of one forward and backward, again and again."""

    def __init__(self, loop: BareLoop):
        with _Products() as products:
            loop.model(*loop.data.batch(1, 0, loop.batch_size, loop.context)).loss.backward()
        self.calls = products.calls

    @torch.no_grad()
    def steps(self, count: int) -> float:
        """Seconds for the products of one step."""
        started = time.perf_counter()
        for _ in range(count):
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)
        return (time.perf_counter() - started) / count


def recorded(settings: RunConfig) -> float:
    """Seconds a step of a whole run by `train`, after a period of 25 steps: whole periods with a probe in each.

    A signal that interrupts the run ends the benchmark too.
    """
    from muonlab.train.run import train

    times: list[float] = []
    outcome = train(settings, on_step=lambda _: times.append(time.perf_counter()))
    if outcome.status == "interrupted":
        sys.exit(128 + outcome.signal)
    return (times[-1] - times[PERIOD]) / (len(times) - 1 - PERIOD)


def matmul_peak(size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s of the best fp32 product of two size x size matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def in_a_process(settings: RunConfig, steps: int, keep: bool = True, threads: int = 1) -> dict[str, float]:
    """Seconds a step and peak resident MiB of the bare loop in a fresh process."""
    program = "import sys, json; sys.path.insert(0, sys.argv[1]); from bench_step import alone;"
    program += "alone(*map(json.loads, sys.argv[2:]))"
    arguments = [json.dumps(value) for value in (settings.as_dict(), steps, keep, threads)]
    command = [sys.executable, "-c", program, str(Path(__file__).parent), *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def alone(values: dict[str, Any], steps: int, keep: bool, threads: int) -> None:
    """What `in_a_process` runs there."""
    if keep:
        settle(threads)
    torch.set_num_threads(threads)
    loop = BareLoop(read_config(values))
    loop.steps(3)
    seconds = loop.steps(steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "memory": peak}))


class Table:
    """Rows of seconds a step against the unit's, measured next to each other."""

    def __init__(self, tokens: int, flops: float, peak: float):
        self.tokens, self.flops, self.peak = tokens, flops, peak
        heads = ("ms/step", "ratio", "[min, max]", "tokens/s", "of peak")
        print(
            f"  {'':<30}" + "".join(f"{head:>{w}}" for head, w in zip(heads, (10, 9, 16, 11, 9), strict=True))
        )

    def row(self, name: str, seconds: list[float], unit: list[float], same_flops: bool = True) -> None:
        """Print one line; `same_flops` false leaves the share of peak out."""
        ratios = sorted(a / b for a, b in zip(seconds, unit, strict=True))
        middle = statistics.median(seconds)
        share = f"{self.flops / middle / self.peak:.2f}" if same_flops else ""
        spread = f"[{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(
            f"  {name:<30}{1e3 * middle:>10.1f}{statistics.median(ratios):>9.3f}{spread:>16}"
            f"{self.tokens / middle:>11,.0f}{share:>9}",
            flush=True,
        )


Steps = Callable[[int], float]


def variants(name: str, folder: str, compiled: bool) -> tuple[BareLoop, dict[str, Steps]]:
    """The bare loop, and seconds a step over a number of steps of every variant, the unit first."""
    small = ["trainer.batch_size=2", "trainer.probe_batch_size=4"] if name == "nanogpt_m" else []
    settings = config(name, folder, *small)
    adamw = config(name, folder, *small, "optimizer=adamw")
    bare = BareLoop(settings)
    runs = itertools.count(1)

    def run(*overrides: str) -> Steps:
        def seconds(steps: int) -> float:
            length = f"trainer.max_steps={PERIOD * (1 + max(1, round(steps / PERIOD))) + 1}"
            return recorded(config(name, folder, *small, f"seed={next(runs)}", length, *overrides))

        return seconds

    if isinstance(bare.model, NanoGPT):
        unit = {"nanoGPT, AdamW": PlainLoop(settings.model, bare.data, bare.batch_size).steps}
    else:
        unit = {"dense, as many active": dense_twin(settings).steps}
    steps: dict[str, Steps] = unit | {
        "bare loop": bare.steps,
        "bare loop, no maxima": BareLoop(settings, maxima=False).steps,
        "bare loop, AdamW": BareLoop(adamw, maxima=False).steps,
        "recorded": run(),
        "recorded, AdamW": run("optimizer=adamw"),
        "products alone": Products(BareLoop(settings)).steps,
    }
    if compiled:
        loop = BareLoop(settings)
        loop.model.compile()
        steps |= {"bare loop, compiled": loop.steps, "recorded, compiled": run("trainer.compile=true")}
    return bare, steps


def bench_model(name: str, repeats: int, seconds: float, compiled: bool) -> None:
    """All variants of one model, interleaved, and the parts of its step."""
    with tempfile.TemporaryDirectory() as folder:
        bare, every = variants(name, folder, compiled)
        for steps_of in every.values():
            steps_of(2)
        steps = max(3, round(seconds / bare.steps(2)))
        bare.parts = dict.fromkeys(PARTS, 0.0)
        tokens = bare.batch_size * bare.context
        print(f"\n{name}: {repeats} interleaved repeats of {steps} steps of {tokens} tokens, one thread")
        peaks: list[float] = []
        times: dict[str, list[float]] = {key: [] for key in every}
        for _ in range(repeats):
            peaks.append(matmul_peak())
            for key, steps_of in every.items():
                times[key].append(steps_of(steps))
        peak = statistics.median(peaks)
        table = Table(tokens, bare.model.flops_per_token(bare.context) * tokens, peak)
        unit = next(iter(times.values()))
        for key, values in times.items():
            table.row(key, values, unit, same_flops="dense" not in key)
        runs = [
            [in_a_process(bare.settings, steps, **how) for how in ({}, {"keep": False}, {"threads": 2})]
            for _ in range(2)
        ]
        alone_base = [row[0]["seconds"] for row in runs]
        for place, key in ((1, "default allocator / kept"), (2, "two threads / one")):
            table.row(key, [row[place]["seconds"] for row in runs], alone_base, same_flops=False)
        total = sum(bare.parts.values())
        shares = ", ".join(f"{part} {100 * value / total:.1f} %" for part, value in bare.parts.items())
        recording = statistics.median(
            a / b for a, b in zip(times["recorded"], times["bare loop"], strict=True)
        )
        print(f"  parts of the bare step: {shares}; recorded / bare loop {recording:.3f}")
        print(
            f"  peak {peak / 1e9:.0f} GFLOP/s (1024^3, fp32); {runs[0][0]['memory']:.0f} MiB resident at most"
        )


def bench_start() -> None:
    """Seconds of a one-step run in a process forked from the warm server, and in a fresh process."""
    from muonlab.study.pool import Job, Pool
    from muonlab.study.standing import Standing

    with tempfile.TemporaryDirectory() as folder:
        overrides = ["trainer=smoke", "trainer.max_steps=1", "schedule.warmup=0", "tracking=none"]
        jobs = iter(
            [Job(config("nanogpt_xs", folder, *overrides, f"seed={s}"), f"s{s}") for s in range(1, 5)]
        )
        started, ends = time.perf_counter(), []
        Pool(1, Path(folder)).run(
            lambda: next(jobs, None), lambda *_: ends.append(time.perf_counter()), "start", 4, 4, Standing
        )
        fork = statistics.median(b - a for a, b in itertools.pairwise(ends))
        print(f"  {'first trial, with the server':<34}{ends[0] - started:>7.1f} s")
        print(f"  {'each further trial (one step)':<34}{fork:>7.1f} s")
        command = [sys.executable, "-m", "muonlab.train", *overrides, f"paths.runs={folder}", "seed=9"]
        started = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        print(f"  {'a fresh process (one step)':<34}{time.perf_counter() - started:>7.1f} s")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition(": ")[2].splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=MODELS, help=f"configs of conf/model; default: {', '.join(MODELS)}"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each variant and repeat")
    parser.add_argument("--compile", action="store_true", help="also compare torch.compile with eager")
    options = parser.parse_args()
    settle(1)
    for model in options.models:
        bench_model(model, options.repeats, options.seconds, options.compile)
    print("\nstart of a trial")
    bench_start()


if __name__ == "__main__":
    main()
