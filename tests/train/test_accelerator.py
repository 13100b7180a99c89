"""The device of a run, and which runs are compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from muonlab.data import make_data
from muonlab.errors import MuonlabError
from muonlab.record import load_run
from muonlab.train import accelerator
from muonlab.train.accelerator import WORTH, is_compiled
from muonlab.train.module import LanguageModel
from muonlab.train.run import train, with_corpus


def test_compiling_without_a_compiler_is_one_sentence(tiny, monkeypatch):
    monkeypatch.setenv("PATH", "/nope")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("CC", "")
    with pytest.raises(MuonlabError, match=r"trainer\.compile=true needs a C\+\+ compiler"):
        train(tiny("trainer.compile=true"))


def test_auto_compiles_the_runs_that_are_long_enough_and_can_be(tiny, monkeypatch):
    def compiled(*overrides):
        settings = tiny("trainer.compile=auto", *overrides).trainer
        return [
            is_compiled(settings, device, share * WORTH[device]) for device in WORTH for share in (0.99, 1.01)
        ]

    assert compiled() == [False, True, False, True]
    assert compiled("trainer.strategy=fsdp2", "trainer.devices=2") == [False] * 4
    monkeypatch.setattr(accelerator, "_has_compiler", lambda: False)
    assert compiled() == [False, False, False, True]


def test_a_short_run_is_trained_as_it_is_without_compiling(tiny):
    losses = [load_run(train(tiny(*o)).folder).steps["train_loss"] for o in ([], ["trainer.compile=auto"])]
    pd.testing.assert_series_equal(*losses, check_exact=True)


def test_a_long_run_is_compiled(tiny, monkeypatch):
    monkeypatch.setitem(WORTH, "cpu", 0.0)
    config = with_corpus(tiny("trainer.compile=auto"))
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: calls.append(model))
    module = LanguageModel(config, make_data(config.data, config.paths.cache))
    assert module.compiled
    assert calls == [module.model]


TOLD = "os.environ['TORCHINDUCTOR_CACHE_DIR']"


@pytest.mark.parametrize(
    ("given", "answer", "folder"),
    [
        ({}, "cache_dir()", ".cache/muonlab/compiled"),
        ({"MUONLAB_CACHE": "kept"}, TOLD, "kept/compiled"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/elsewhere"}, TOLD, "/elsewhere"),
    ],
)
def test_compiled_code_is_kept_in_the_cache_unless_torch_is_told_of_another_folder(
    given, answer, folder, tmp_path
):
    """In a process of its own: torch chooses when its compiler is first imported, which one of them does."""
    compiler = "from torch._inductor.runtime.cache_dir_utils import cache_dir;" if answer != TOLD else ""
    ask = f"import os, muonlab.begin; {compiler} print({answer})"
    others = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TORCHINDUCTOR_CACHE_DIR", "MUONLAB_CACHE")
    }
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=tmp_path,
        env=others | given | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / folder)
