"""The script for a GPU, at a tiny size on the CPU."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    on_gpu = importlib.import_module("on_gpu")
    monkeypatch.setattr(on_gpu, "PATIENCE", 0.2)
    return on_gpu


def test_a_stage_that_fails_hangs_or_is_not_there_does_not_stop_the_next_and_keeps_what_it_measured(
    on_gpu, tmp_path
):
    measured = tmp_path / "hangs.jsonl"
    hangs = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f'open({str(measured)!r}, \'w\').write(\'{{"variant": "first"}}\\n{{"torn\');'
        "print('begun', flush=True); time.sleep(600)"
    )
    stages = [
        on_gpu.Stage("fails", 60, [sys.executable, "-c", "raise SystemExit(3)"]),
        on_gpu.Stage("hangs", 2, [sys.executable, "-c", hangs]),
        on_gpu.Stage("absent", 60, [str(tmp_path / "no-such-program")]),
        on_gpu.Stage("last", 60, [sys.executable, "-c", "print('here')"]),
    ]
    ended = on_gpu.run_stages(stages, tmp_path)
    how = [each.how for each in ended]
    assert how[0] == "failed (exit code 3)"
    assert how[1] == "stopped at its limit"
    assert how[2].startswith("failed: ")
    assert how[3] == "done"
    assert (tmp_path / "last.log").read_text() == "here\n"
    assert [each["how"] for each in json.loads((tmp_path / "stages.json").read_text())] == how
    assert on_gpu.measurements(tmp_path, "hangs") == [{"variant": "first"}]
    assert "| first |" in (tmp_path / "summary.md").read_text()


def test_the_dry_run_measures_every_variant_and_sums_up(on_gpu, tmp_path):
    """The stages that take seconds; `--dry-run` alone goes through the others too."""
    names = ["speed", "traces", "workers"]
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), str(tmp_path), "--dry-run", "--only", *names]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)
    ended = {each["name"]: each["how"] for each in json.loads((tmp_path / "stages.json").read_text())}
    logs = {name: (tmp_path / f"{name}.log").read_text()[-2000:] for name in ended}
    assert ended == dict.fromkeys(names, "done"), logs
    assert done.returncode == 0
    speed = on_gpu.measurements(tmp_path, "speed")
    assert not [row for row in speed if "error" in row]
    assert len(speed) == 10
    assert len(on_gpu.measurements(tmp_path, "traces")) == 3
    assert [row["finished"] for row in on_gpu.measurements(tmp_path, "workers")] == [1, 2]
    assert "# Dry run on the CPU" in done.stdout
    assert "## seconds a step with a part over without it" not in done.stdout
    assert "| recording |" in on_gpu.summary([], tmp_path, dry=False)


@pytest.mark.parametrize(("measured", "code"), [({"seconds": 1.0}, 0), ({"error": "out of memory"}, 1)])
def test_a_stage_whose_measurement_fails_has_failed(on_gpu, tmp_path, monkeypatch, measured, code):
    stages = importlib.import_module("gpu_stages")
    monkeypatch.setitem(stages.STAGES, "speed", lambda place: place.report(variant="compiled", **measured))
    monkeypatch.setattr(sys, "argv", ["gpu_stages.py", "speed", str(tmp_path), "--dry-run"])
    assert stages.main() == code


def test_an_interrupted_command_says_where_its_measurements_are(on_gpu, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(on_gpu, "run_stages", interrupted)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", str(tmp_path), "--dry-run"])
    assert on_gpu.main() == 130
    assert capsys.readouterr().out == f"stopped; {tmp_path} has what was measured\n"


def test_a_profile_counts_the_time_of_a_kernel_once(on_gpu):
    def row(device, annotation=False):
        return SimpleNamespace(device_type=device, is_user_annotation=annotation)

    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    kernel = row(cuda)
    stages = importlib.import_module("gpu_stages")
    assert stages.of_the_device([row(cpu), kernel, row(cuda, annotation=True)], "cuda") == [kernel]


@pytest.mark.cuda
def test_a_warning_of_a_gpus_libraries_fails_no_check():
    assert warnings.filters[0][0] == "default"
