"""python benchmarks/long_run.py [--every N] [steps ...]: what a long record costs to resume, finish and load.

A made-up record of 12 layers of 12 heads is written as a run writes it, a part every `--every` steps, at each length
(10,000 and 100,000 steps). Then each of these is done in a process of its own, with its processor seconds, which a busy
machine does not change, and how far its peak resident memory rose above that after the imports:

    write     the parts, on one thread
    resume    drop the last tenth of a part, check every file, and read all rows for MLflow
    finish    merge the parts, score the spikes, write events.json
    stream    all heads of the finished run, a piece at a time
    analyse   the frames that figures and claims read
    frame     all heads of the finished run as one frame, whose size is the run's

The last column is the larger length's memory over the smaller one's: 1 is memory that does not grow.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from muonlab.record import RunRecord, load_run
from muonlab.record.environment import Environment

LAYERS = HEADS = 12
CONFIG = {
    "seed": 1,
    "model": {"context": 256},
    "optimizer": {"name": "muonclip", "lr": 0.02, "weight_decay": 0.0, "tau": 30.0},
}


def write(folder: Path, steps: int, every: int) -> int:
    """Steps of a record whose process ends after its last flush."""
    record = RunRecord.create(folder, CONFIG, [], Environment(host="made up"))
    generator = torch.Generator().manual_seed(steps)
    for step in range(steps):
        logits = torch.randn(LAYERS, HEADS, generator=generator).abs()
        heads = {"max_logit": logits, "max_logit_abs": logits, "gamma": (1.2 - logits).clamp(0.5, 1)}
        scalars = {"train_loss": logits.mean(), "grad_norm": logits.std(), "lr": 0.02, "seconds": 0.1 * step}
        if step % 10 == 0:
            heads |= {"entropy": logits, "one_hot": logits}
            scalars["probe_loss"] = logits.mean()
        record.append(step, scalars, heads)
        if (step + 1) % every == 0:
            record.flush()
    record.flush()
    return steps


def resume(folder: Path, steps: int, every: int) -> int:
    """Rows that are sent to MLflow again."""
    from muonlab.record.parts import set_aside_torn
    from muonlab.record.stream import whole_until

    record = RunRecord.reopen(folder)
    assert set_aside_torn(folder / "traces") == []
    record.truncate(min(whole_until(folder / "traces"), steps - 1 - every // 10))
    return sum(len(rows) for rows in record.rows())


def finish(folder: Path, steps: int, every: int) -> int:
    """Bytes of the traces of a run that has ended."""
    RunRecord.reopen(folder).finish("finished")
    return sum(path.stat().st_size for path in (folder / "traces").iterdir())


def stream(folder: Path, steps: int, every: int) -> int:
    """Rows of single heads."""
    return sum(len(piece) for piece in load_run(folder).stream("max_logits"))


def analyse(folder: Path, steps: int, every: int) -> int:
    """Rows of steps."""
    from analysis.frames import collect

    return len(collect([folder]).steps)


def frame(folder: Path, steps: int, every: int) -> int:
    """Rows of single heads."""
    return len(load_run(folder).max_logits)


WORK = {work.__name__: work for work in (write, resume, finish, stream, analyse, frame)}


def measured(name: str, folder: Path, steps: int, every: int) -> dict[str, float]:
    """Seconds and MB of one piece of work in a process of its own."""
    command = [sys.executable, __file__, "--work", name, str(folder), "--every", str(every), str(steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def work(name: str, folder: Path, steps: int, every: int) -> None:
    """What a process of `measured` does."""
    import mlflow.entities  # noqa: F401  what a run has imported by then is no part of the figure
    import pandas  # noqa: F401

    import analysis.frames  # noqa: F401

    before = peak_kb()
    began = time.process_time()
    count = WORK[name](folder, steps, every)
    seconds = time.process_time() - began
    print(json.dumps({"seconds": seconds, "mb": (peak_kb() - before) / 1024, "count": count}))


def peak_kb() -> int:
    """The largest resident memory of this process; that of getrusage would begin at its parent's."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def main() -> None:
    """Write the records, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("steps", nargs="*", type=int, default=[10_000, 100_000])
    parser.add_argument("--every", type=int, default=1000, help="steps between two checkpoints")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        return work(given.work[0], Path(given.work[1]), given.steps[0], given.every)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in WORK}
    with tempfile.TemporaryDirectory() as place:
        for steps in given.steps:
            folder = Path(place) / f"run-{steps}"
            for name in WORK:
                own = folder
                if name == "resume":  # files of a record are replaced, never written into
                    own = folder.with_name("resumed")
                    shutil.copytree(folder, own, copy_function=os.link)
                results[name].append(measured(name, own, steps, given.every))
            shutil.rmtree(Path(place) / "resumed")
    print(f"{LAYERS * HEADS} heads, a part every {given.every} steps")
    for name, rows in results.items():
        line = "  ".join(
            f"{steps:>7,} steps: {row['seconds']:6.1f} s {row['mb']:6.0f} MB"
            for steps, row in zip(given.steps, rows, strict=True)
        )
        print(f"{name:<8} {line}   memory x{rows[-1]['mb'] / max(rows[0]['mb'], 1):.1f}")


if __name__ == "__main__":
    main()
