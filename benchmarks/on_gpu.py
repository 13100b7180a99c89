"""python benchmarks/on_gpu.py FOLDER --tokens FILE: everything that is to be seen on a GPU, in one command.

Stages in order of worth, each in a process of its own within its time limit: none can stop the next, and whatever one
measured before it failed or was stopped is kept. FOLDER gets a log and the measurements of each stage, and summary.md,
which is written anew after each. `--dry-run` does the same at a tiny size on the CPU, and compiles nothing.

FILE is a corpus for a machine without a network: python benchmarks/corpus.py FILE (26 MB). Such a machine with torch,
Lightning, pandas, pyarrow, SciPy, hypothesis, and pytest with xdist also needs these, on Python 3.12 for x86-64; MLflow
is not needed:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
      --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 -d wheels hydra-core==1.3.8 omegaconf==2.3.1 \\
      optuna==5.0.0 alembic==1.20.1 Mako==1.4.3 colorlog==6.12.0 sqlalchemy==2.1.9 pydantic==2.14.3 \\
      pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5
    pip wheel --no-deps -w wheels antlr4-python3-runtime==4.9.3
    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site:.     # there
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE = 10  # seconds from the request to stop until the kill; a run saves a checkpoint meanwhile
# Of one H100, from what their authors state of eight: tokens a second, and FLOP/s over 989e12, by their own counts.
PUBLISHED: tuple[dict[str, object], ...] = (
    {
        "published": "llm.c's trainer, GPT-2 124M: 10B tokens in 45 minutes (modded-nanogpt, README, record 1)",
        "rate": 10e9 / (45 * 60) / 8,
    },
    {
        "published": "nanochat, 24 layers: 4.3308e19 FLOPs in 10949 s (nanochat, README, Jan 29 2026)",
        "of_sheet": 4.330784e19 / 10949.467 / 8 / 989e12,
    },
)


@dataclass(frozen=True)
class Stage:
    """A name, a limit in seconds and the command."""

    name: str
    limit: float
    command: Sequence[str]


@dataclass(frozen=True)
class Ended:
    """How a stage ended: "done", "failed" or "stopped at its limit", and the seconds that it took."""

    name: str
    how: str
    seconds: float


def stages(folder: Path, tokens: str, dry: bool, limit: float | None) -> list[Stage]:
    """All stages; `limit` replaces each one's own."""
    python, dry_run = sys.executable, ["--dry-run"] if dry else []

    def own(name: str, seconds: float) -> Stage:
        command = [python, str(HERE / "gpu_stages.py"), name, str(folder), "--tokens", tokens, *dry_run]
        return Stage(name, limit or seconds, command)

    tests = [python, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    tests += ["--collect-only"] if dry else ["-n", "8", "-rf", "--durations=10"]
    # Only files that have such tests: the others may import what is not there.
    of_cuda = [path for path in (HERE.parent / "tests").rglob("test_*.py") if "mark.cuda" in path.read_text()]
    tests += [str(path.relative_to(HERE.parent)) for path in sorted(of_cuda)]
    experiment = [python, "-m", "muonlab.experiment", "ablation", "scale=gpu-short", "tracking=none"]
    experiment += [f"paths.runs={folder / 'runs'}", f"paths.cache={folder / 'cache'}"]
    experiment += [f"--results={folder / 'results'}", f"--studies={folder / 'studies'}", "--workers=1"]
    tiny = [
        "data=synthetic",
        "model=nanogpt_xxs",
        "trainer=smoke",
        "trainer.max_steps=2",
        "schedule.warmup=0",
    ]
    experiment += tiny if dry else [f"data.path={tokens}"]
    return [
        own("machine", 60),
        Stage("tests", limit or 240, tests),
        own("speed", 420),
        own("traces", 180),
        own("profile", 120),
        own("workers", 120),
        Stage("ablation", limit or (120 if dry else 1800), experiment),
    ]


def run_stages(wanted: Sequence[Stage], folder: Path, dry: bool = False) -> list[Ended]:
    """Run one after the other; FOLDER/NAME.log has what each prints."""
    folder.mkdir(parents=True, exist_ok=True)
    ended: list[Ended] = []
    for stage in wanted:
        print(f"{stage.name}: at most {stage.limit:g} s: {shlex.join(stage.command)}", flush=True)
        started = time.monotonic()
        try:
            how = run_stage(stage, folder / f"{stage.name}.log")
        except OSError as error:
            how = f"failed: {error}"
        ended.append(Ended(stage.name, how, round(time.monotonic() - started, 1)))
        print(f"{stage.name}: {how} after {ended[-1].seconds} s", flush=True)
        (folder / "stages.json").write_text(json.dumps([asdict(each) for each in ended], indent=1) + "\n")
        (folder / "summary.md").write_text(summary(ended, folder, dry))
    return ended


def run_stage(stage: Stage, log: Path) -> str:
    """The stage in a process group of its own, which is interrupted at the limit and then killed."""
    with log.open("w") as output:
        process = subprocess.Popen(
            stage.command, cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(stage.limit)
        except subprocess.TimeoutExpired:
            stop(process, signal.SIGINT)
            return "stopped at its limit"
        finally:
            if process.poll() is None:
                stop(process, signal.SIGKILL)
    return "done" if code == 0 else f"failed (exit code {code})"


def stop(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to the group, and kill what has not ended in PATIENCE seconds."""
    os.killpg(process.pid, number)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measurements(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a stage has measured; none where it has not begun. A line that a kill tore off is left out."""
    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Measurements as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(shown(row.get(column)) for column in columns) + " |" for row in rows]


def shown(value: object) -> str:
    """A value in a cell."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def summary(ended: Sequence[Ended], folder: Path, dry: bool) -> str:
    """How each stage ended, its measurements, and the shares of the parts of a step."""
    title = "Dry run on the CPU: tiny and not compiled, its times say nothing of a GPU" if dry else "On a GPU"
    lines = [f"# {title}", "", *table([asdict(each) for each in ended])]
    for each in ended:
        if rows := measurements(folder, each.name):
            lines += ["", f"## {each.name}", "", *table(rows)]
    seconds = {row["variant"]: row["seconds"] for row in measurements(folder, "speed") if "seconds" in row}
    parts = [
        {"part": part, "ratio": seconds[more] / seconds[less]}
        for part, more, less in (
            ("recording", "compiled, recorded", "compiled"),
            ("clip and the kernels' maxima", "compiled", "compiled, no clip"),
            ("exact maxima", "compiled, exact maxima", "compiled"),
            ("Muon in place of AdamW", "compiled, no clip", "compiled, AdamW"),
            ("eager in place of compiled", "eager", "compiled"),
        )
        if more in seconds and less in seconds
    ]
    if parts and not dry:
        lines += ["", "## seconds a step with a part over without it", "", *table(parts)]
        lines += ["", "## one H100 elsewhere", "", *table(PUBLISHED)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """0 if no stage failed; one that was stopped at its limit has not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", default="", help="a file that benchmarks/corpus.py made")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--limit", type=float, help="seconds for each stage, in place of its own limit")
    parser.add_argument("--only", nargs="+", help="names of stages")
    given = parser.parse_args()
    tokens = str(Path(given.tokens).resolve()) if given.tokens else ""
    folder = given.folder.resolve()
    every = stages(folder, tokens, given.dry_run, given.limit)
    names = [stage.name for stage in every]
    if unknown := [name for name in given.only or () if name not in names]:
        parser.error(f"no stage {unknown[0]!r}; there are {', '.join(names)}")
    if not given.dry_run and not (tokens and Path(tokens).is_file()):
        parser.error("--tokens needs a file that benchmarks/corpus.py made")
    wanted = [stage for stage in every if not given.only or stage.name in given.only]
    try:
        ended = run_stages(wanted, folder, given.dry_run)
    except KeyboardInterrupt:
        print(f"stopped; {folder} has what was measured")
        return 128 + signal.SIGINT
    print((folder / "summary.md").read_text())
    return 0 if not any(each.how.startswith("failed") for each in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
