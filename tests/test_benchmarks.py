"""The benchmarks still run against the package: each is imported, and those of a step take one."""

import importlib
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from muonlab.study.pool import Pool

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WITH_OTHERS = {"parity", "parity_rules"}  # imports the packages that it compares with


@pytest.fixture
def benchmark_named(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("name", sorted({path.stem for path in BENCHMARKS.glob("*.py")} - WITH_OTHERS))
def test_a_benchmark_can_be_imported(benchmark_named, name):
    assert benchmark_named(name).__doc__


def test_every_variant_of_a_step_takes_one(benchmark_named, tmp_path):
    _, variants = benchmark_named("bench_step").variants("nanogpt_xxs", str(tmp_path), compiled=False)
    assert [name for name in variants if "recorded" not in name] == [
        "nanoGPT, AdamW",
        "bare loop",
        "bare loop, no maxima",
        "bare loop, AdamW",
        "products alone",
    ]
    assert all(steps(1) > 0 for name, steps in variants.items() if "recorded" not in name)


def test_the_start_of_a_trial_is_timed(benchmark_named, monkeypatch, capsys):
    bench = benchmark_named("bench_step")
    pool = create_autospec(Pool)
    pool.return_value.run.side_effect = lambda _, on_result, *__: [on_result(None, None) for _ in range(4)]
    monkeypatch.setattr("muonlab.study.pool.Pool", pool)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: None)
    bench.bench_start()
    assert "each further trial" in capsys.readouterr().out


def test_the_parts_of_a_step_are_all_of_it(benchmark_named):
    profile = benchmark_named("profile_step")
    parts, milliseconds = profile.shares("nanogpt_xxs", 1)
    assert set(parts) <= set(profile.SHOWN)
    assert parts["products"] > 0 < parts["optimizer"]
    assert milliseconds > 0
