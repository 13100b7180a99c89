"""python benchmarks/bench_step.py [model ...]: what a training step costs, as ratios within one run.

Interleaved repeats on one thread; medians over repeats, with their range. Read it on an idle machine.

    recording    a Lightning step with every trace, max logit, probe, checkpoint and MLflow, over the bare loop's step
    compiled     torch.compile over eager, bare loop; --compile, since compiling takes from seconds to minutes
    allocator    freed memory kept over glibc's default, bare loop, in processes of their own
    attention    explicit over fused with an exact pass for the max logits, forward and backward
    start        seconds until the first step of a trial forked from the warm server, and of a fresh process
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from muonlab.cli import compose_config, plain
from muonlab.runtime import settle


def config(model: str, folder: str, *overrides: str) -> dict:
    """A run of `model` with muonclip and everything that is recorded by default."""
    paths = [f"paths.runs={folder}", "trainer.progress=false", "trainer.val_every=0"]
    return plain(compose_config("train", [f"model={model}", *paths, *overrides]))


class BareLoop:
    """The same model, optimizer and batches with nothing around them."""

    def __init__(self, settings: dict, compiled: bool = False):
        from muonlab.data import build_data
        from muonlab.train.config import resolve
        from muonlab.train.module import LanguageModel

        chosen = dict(settings["data"])
        self.data = build_data(chosen.pop("name"), **chosen)
        torch.manual_seed(settings["seed"])
        module = LanguageModel(resolve(settings), self.data)
        self.model, self.optimizer = module.model, module.optimizer
        self.batch_size, self.context = module.batch_size, module.context
        self.index = 0
        if compiled:
            self.model.compile()

    def steps(self, count: int) -> float:
        """Seconds a step over `count` steps."""
        started = time.perf_counter()
        for _ in range(count):
            tokens, targets = self.data.batch(1, self.index, self.batch_size, self.context)
            self.index += 1
            self.optimizer.zero_grad(set_to_none=True)
            self.model(tokens, targets).loss.backward()
            self.optimizer.observe(self.model.max_logits())
            self.optimizer.step()
        return (time.perf_counter() - started) / count


def recorded(settings: dict, skip: int = 5) -> float:
    """Seconds a step of a whole run by `train`, from its `skip`-th step to its end; the fixed costs lie outside."""
    from muonlab.train.run import train

    times: list[float] = []
    train(settings, on_step=lambda _: times.append(time.perf_counter()))
    return (times[-1] - times[skip]) / (len(times) - 1 - skip)


def ratio(name: str, pairs: list[tuple[float, float]]) -> None:
    """Print a / b over pairs (a, b) of seconds measured next to each other."""
    ratios = sorted(a / b for a, b in pairs)
    a, b = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    middle = statistics.median(ratios)
    spread = f"[{ratios[0]:.2f}, {ratios[-1]:.2f}]"
    print(f"  {name:<34}{middle:>7.3f} {spread:>14}   {a:9.1f} / {b:.1f} ms", flush=True)


def bench_recording(model: str, repeats: int, steps: int) -> None:
    """Lightning with all recording over the bare loop, interleaved."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        bare = BareLoop(config(model, folder))
        bare.steps(5)
        for repeat in range(repeats):
            b = bare.steps(steps)
            pairs.append((recorded(config(model, folder, f"seed={repeat}", f"trainer.max_steps={steps}")), b))
    ratio("recording: Lightning / bare loop", pairs)


def bench_compiled(model: str, repeats: int, steps: int) -> None:
    """A compiled bare loop over an eager one, interleaved, after compiling."""
    with tempfile.TemporaryDirectory() as folder:
        loops = [BareLoop(config(model, folder), compiled) for compiled in (True, False)]
        started = time.perf_counter()
        loops[0].steps(1)
        seconds = time.perf_counter() - started
        loops[1].steps(1)
        pairs = [tuple(loop.steps(steps) for loop in loops) for _ in range(repeats)]
    ratio("compiled / eager", pairs)
    print(f"  {'first compiled step':<34}{seconds:>7.1f} s")


def bench_allocator(model: str, repeats: int, steps: int) -> None:
    """The bare loop with freed memory kept over the same with glibc's defaults, each in a fresh process."""
    program = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]);"
        "from muonlab.runtime import keep_freed_memory; sys.argv[2] == '1' and keep_freed_memory();"
        "from bench_step import BareLoop, config; loop = BareLoop(config(sys.argv[3], '.')); loop.steps(5);"
        "print(loop.steps(int(sys.argv[4])))"
    )
    here = str(Path(__file__).parent)

    def once(keep: str) -> float:
        command = [sys.executable, "-c", program, here, keep, model, str(steps)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    ratio("allocator: memory kept / default", [(once("1"), once("0")) for _ in range(repeats)])


def bench_attention(repeats: int = 50) -> None:
    """Explicit attention, whose maxima are free, over fused attention with an exact pass: forward and backward."""
    from torch.nn.functional import scaled_dot_product_attention

    from muonlab.models.explicit_attention import explicit_attention
    from muonlab.models.max_logits import logit_range

    for heads, context in ((2, 64), (4, 128)):
        q, k, v = (torch.randn(16, heads, context, 32, requires_grad=True) for _ in range(3))

        def explicit(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> float:
            started = time.perf_counter()
            explicit_attention(q, k, v)[0].sum().backward()
            return time.perf_counter() - started

        def fused(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> float:
            started = time.perf_counter()
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
            logit_range(q.detach(), k.detach())
            out.sum().backward()
            return time.perf_counter() - started

        pairs = [(explicit(), fused()) for _ in range(repeats + 5)][5:]
        ratio(f"explicit / fused, context {context}", pairs)


def bench_start() -> None:
    """Seconds of a one-step run in a process forked from the warm server, and in a fresh process."""
    from muonlab.sweep.pool import Job, Pool

    with tempfile.TemporaryDirectory() as folder:
        overrides = ["trainer=smoke", "trainer.max_steps=1", "schedule.warmup=0", "tracking=none"]
        names = iter(range(1, 5))
        started, ends = time.perf_counter(), []

        def next_job() -> Job | None:
            seed = next(names, None)
            return (
                None
                if seed is None
                else Job(config("nanogpt_xs", folder, *overrides, f"seed={seed}"), f"s{seed}")
            )

        Pool(1, Path(folder)).run(next_job, lambda *_: ends.append(time.perf_counter()), "start", 4, 4)
        fork = statistics.median(b - a for a, b in itertools.pairwise(ends))
        print(f"  {'first trial, with the server':<34}{ends[0] - started:>7.1f} s")
        print(f"  {'each further trial (one step)':<34}{fork:>7.1f} s")
        command = [sys.executable, "-m", "muonlab.train", *overrides, f"paths.runs={folder}", "seed=9"]
        started = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        print(f"  {'a fresh process (one step)':<34}{time.perf_counter() - started:>7.1f} s")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition(": ")[2].splitlines()[0])
    parser.add_argument("models", nargs="*", default=["nanogpt_xs"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--compile", action="store_true", help="also compare torch.compile with eager")
    options = parser.parse_args()
    settle(1)
    for model in options.models:
        print(f"{model}: {options.repeats} interleaved repeats of {options.steps} steps, one thread")
        print(f"  {'':<34}{'median':>7} {'[min, max]':>14}")
        bench_recording(model, options.repeats, options.steps)
        bench_allocator(model, options.repeats, options.steps)
        if options.compile:
            bench_compiled(model, options.repeats, options.steps)
    print("attention with exact max logits, forward and backward")
    bench_attention()
    print("start of a trial")
    bench_start()


if __name__ == "__main__":
    main()
