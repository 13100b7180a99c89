"""The device of a run, and which runs are compiled."""

import os

import pandas as pd
import pytest
import torch

from muonlab.data import make_data
from muonlab.data.cache import cache_folder
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


def test_a_long_run_is_compiled_and_its_code_kept_where_torch_is_told_to(tiny, monkeypatch):
    monkeypatch.setitem(WORTH, "cpu", 0.0)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "of the user's")
    config = with_corpus(tiny("trainer.compile=auto"))
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: calls.append(model))
    module = LanguageModel(config, make_data(config.data, config.paths.cache))
    assert module.compiled
    assert calls == [module.model]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "of the user's"
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    LanguageModel(config, make_data(config.data, config.paths.cache))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache_folder(config.paths.cache) / "compiled")
