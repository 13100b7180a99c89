"""What benchmarks/on_gpu.py measures: python benchmarks/gpu_stages.py NAME FOLDER, one stage in this process.

Every measurement is appended to FOLDER/NAME.jsonl as it is made, so that a stage that is stopped keeps what it has.
"""

import argparse
import gc
import itertools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpu_loop import Loop, Place, wait

from muonlab.record import load_run

# Dense bf16 FLOP/s by NVIDIA's data sheets (half of what they print, which counts zeros skipped by sparsity).
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
PACKAGES = ("torch", "triton", "lightning", "hydra-core", "omegaconf", "optuna", "numpy", "pandas", "pyarrow")
RAISED = {"adamw": 0.008, "muon": 0.016, "muonclip": 0.016}  # eight times the middle of gpu-short's ranges


def machine(place: Place) -> None:
    """The device and the versions."""
    installed = {each.name.lower(): each.version for each in metadata.distributions()}
    versions = {name: installed.get(name, "absent") for name in PACKAGES}
    device = "none" if place.dry else torch.cuda.get_device_name()
    place.report(device=device, python=platform.python_version(), cuda=torch.version.cuda, **versions)
    if not place.dry:
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout)


def product_peak(place: Place) -> float:
    """FLOP/s of the best bf16 product of two square matrices of random entries."""
    size = 128 if place.dry else 8192
    a, b = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        wait(place.device)
        started = time.perf_counter()
        a @ b
        wait(place.device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def speed(place: Place) -> None:
    """Tokens a second of every variant, in order of worth; the shares of the parts are differences between them."""
    device = "none" if place.dry else torch.cuda.get_device_name()
    sheet = next((peak for name, peak in PEAKS.items() if name in device), None)
    measured = product_peak(place)
    place.report(variant="one product", peak=measured, sheet=sheet)

    def ours(optimizer: str, compiled: bool = True, maxima: str = "none", mixture: bool = False) -> Loop:
        config = place.config(f"optimizer={optimizer}", mixture=mixture)
        return Loop(place, config, compiled=compiled, maxima=maxima)

    def nanogpt(compiled: bool) -> Loop:
        return Loop(place, place.config("optimizer=adamw"), compiled=compiled, written_out=True)

    variants: dict[str, Callable[[], Loop]] = {
        "compiled": lambda: ours("muonclip", maxima="kernel"),
        "compiled, no clip": lambda: ours("muon"),
        "nanoGPT, compiled, AdamW": lambda: nanogpt(compiled=True),
        "compiled, AdamW": lambda: ours("adamw"),
        "eager": lambda: ours("muonclip", compiled=False, maxima="kernel"),
        "nanoGPT, AdamW": lambda: nanogpt(compiled=False),
        "compiled, exact maxima": lambda: ours("muonclip", maxima="exact"),
        "mixture, compiled": lambda: ours("muonclip", maxima="kernel", mixture=True),
    }
    warm_up, steps = (2, 2) if place.dry else (5, 20)

    def measure(name: str) -> None:
        loop: Loop | None = None
        try:
            loop = variants[name]()
            first = loop.seconds(0, 1)
            seconds = loop.seconds(warm_up, steps)
            rate = loop.flops / seconds
            share = None if sheet is None else rate / sheet
            place.report(
                variant=name,
                first=first,  # seconds of the first step, which compiles
                seconds=seconds,
                tokens=loop.tokens,
                rate=loop.tokens / seconds,
                of_sheet=share,
                of_product=rate / measured,
                memory=None if place.dry else torch.cuda.max_memory_allocated() / 2**30,  # GiB, at most
            )
        except Exception as error:  # one variant that fails, by memory say, does not cost the others
            place.report(variant=name, error=in_one_line(error))
        loop = None  # a compiled model refers to itself
        torch.compiler.reset()
        gc.collect()
        if not place.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    first, *rest = variants
    measure(first)
    recorded(place)
    for name in rest:
        measure(name)


def recorded(place: Place) -> None:
    """A whole run of `train` with every trace and probe, against the same loop without: in steady state."""
    from muonlab.train.run import train

    times: dict[int, float] = {}
    first, last = (2, 6) if place.dry else (6, 56)  # two periods of the probe
    config = place.config("optimizer=muonclip", f"trainer.max_steps={last}")

    def on_step(step: int) -> None:
        if step in (first, last):
            wait(place.device)
            times[step] = time.perf_counter()

    try:
        train(config, on_step)
        seconds = (times[last] - times[first]) / (last - first)
        tokens = config.trainer.batch_size * config.model.context
        place.report(variant="compiled, recorded", seconds=seconds, tokens=tokens, rate=tokens / seconds)
    except Exception as error:
        place.report(variant="compiled, recorded", error=in_one_line(error))


def traces(place: Place) -> None:
    """Loss and largest max logit of AdamW, Muon and MuonClip at one raised rate each, written to traces.csv."""
    import pandas as pd

    tables = []
    for name, rate in RAISED.items():
        try:
            status, table = trace(place, name, rate)
        except Exception as error:  # one optimizer that fails does not cost the others
            place.report(optimizer=name, lr=rate, error=in_one_line(error))
            continue
        tables.append(table)
        pd.concat(tables).to_csv(place.folder / "traces.csv", index=False)
        loss, max_logit = float(table["train_loss"].iloc[-1]), float(table["max_logit"].max())
        place.report(optimizer=name, lr=rate, status=status, loss=loss, max_logit=max_logit)


def trace(place: Place, name: str, rate: float) -> tuple[str, Any]:
    """How a run of the optimizer ended, and its training loss and largest max logit by step."""
    from muonlab.train.run import train

    of_step = [f"trainer.max_steps={6 if place.dry else 300}", "optimizer.weight_decay=0"]
    of_step += ["trainer.exact_every=1"] + ([] if place.dry else ["trainer.accumulate=2"])
    outcome = train(place.config(f"optimizer={name}", f"optimizer.lr={rate}", *of_step))
    run = load_run(outcome.folder)
    largest = run.steps["step"].map(run.max_logits.groupby("step")["value"].max())
    return outcome.status, run.steps[["step", "train_loss"]].assign(optimizer=name, max_logit=largest)


def in_one_line(error: Exception) -> str:
    """Its type and the first line of what it says, which may be nothing."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def profile(place: Place) -> None:
    """The kernels of a few steps by time, eager and compiled, and how long the device had none."""
    for name in ("eager", "compiled"):
        loop = Loop(place, place.config("optimizer=muonclip"), compiled=name == "compiled", maxima="kernel")
        loop.seconds(2 if place.dry else 5, 1)
        place.report(variant=name, **kernels(place, name, loop.step))


def kernels(place: Place, name: str, step: Callable[[], None]) -> dict[str, object]:
    """Seconds of some steps, of the device in them, and of the kernels that took most; two files have them all."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] + ([] if place.dry else [ProfilerActivity.CUDA])
    with torch.profiler.profile(activities=kinds) as profiler:
        started = time.perf_counter()  # the profiler itself takes seconds to begin and to end
        for _ in range(2 if place.dry else 5):
            step()
        wait(place.device)
        wall = time.perf_counter() - started
    key = "self_cpu_time_total" if place.dry else "self_device_time_total"
    averages = profiler.key_averages()
    (place.folder / f"profile-{name}.txt").write_text(averages.table(sort_by=key, row_limit=40))
    profiler.export_chrome_trace(str(place.folder / f"profile-{name}.json.gz"))
    rows = of_the_device(averages, place.device.type)
    busy = sum(getattr(row, key) for row in rows) / 1e6
    rows.sort(key=lambda row: -getattr(row, key))
    return {"wall": wall, "busy": busy, "top": {row.key[:60]: getattr(row, key) / 1e6 for row in rows[:5]}}


def of_the_device(averages: Iterable[Any], kind: str) -> list[Any]:
    """The rows of what ran on a kind of device: those of operations and ranges repeat the time of their kernels."""
    return [row for row in averages if row.device_type.name.lower() == kind and not row.is_user_annotation]


def workers(place: Place) -> None:
    """Runs an hour of a small model on one device with 1, 2, 4 and 8 at once."""
    from muonlab.study.pool import Job, Pool
    from muonlab.study.standing import Standing

    numbers = itertools.count(1)
    for count in (1, 2) if place.dry else (1, 2, 4, 8):
        small = ["model=nanogpt_s", "trainer=default", "trainer.max_steps=300"]
        overrides = ["trainer.max_steps=2"] if place.dry else small
        configs = [
            place.config(*overrides, f"seed={next(numbers)}")
            for _ in range(count if place.dry else 2 * count)
        ]
        jobs = iter([Job(config, f"{count}-{i}") for i, config in enumerate(configs)])
        results: list[str] = []
        started = time.perf_counter()
        Pool(count, place.folder / "workers").run(
            lambda jobs=jobs: next(jobs, None),
            lambda _, result, results=results: results.append(result.status),
            "workers",
            len(configs),
            len(configs),
            Standing,
        )
        seconds = time.perf_counter() - started
        done = results.count("finished")
        place.report(workers=count, finished=done, of=len(configs), an_hour=3600 * done / seconds)


STAGES = {stage.__name__: stage for stage in (machine, speed, traces, profile, workers)}


def main() -> int:
    """One stage: 1 where a measurement of it failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", default="")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    place = Place(given.stage, given.folder.resolve(), given.tokens, given.dry_run)
    STAGES[given.stage](place)
    return min(place.failures, 1)


if __name__ == "__main__":
    sys.exit(main())
