"""Two processes that share each batch train as one does."""

import multiprocessing
import os
import socket
import warnings

import numpy as np
import pytest

from muonlab.record import load_run
from muonlab.train.run import run_folder, train

TAU = 0.15  # some heads of the tiny run pass it, some do not


def run_rank(rank, port, config):
    """One rank as a launcher such as torchrun starts it."""
    ranks = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    train(config)


def train_on_two(config):
    """Forked, so that Lightning need not be imported again, which takes longer than the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads at a fork
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=run_rank, args=(rank, port, config)) for rank in range(2)]
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    return load_run(run_folder(config))


@pytest.mark.parametrize(("model", "exact_every"), [("nanogpt_xs", 1), ("moe_xs", 3)])
def test_ddp_follows_one_process(tiny, tmp_path, model, exact_every, monkeypatch):
    """The mean loss and the maxima over ranks, of one batch dealt out in turn. In fp64, because fp32's rounding alone
    grows to 1e-5 within the run, through what Newton-Schulz makes of small singular values."""
    monkeypatch.setattr("muonlab.models.attention.EXPLICIT_CONTEXT", 128 if exact_every == 1 else 0)
    precision = ["trainer.precision=fp64", "optimizer.ns_dtype=float64"]
    overrides = [f"model={model}", *precision, f"optimizer.tau={TAU}", f"trainer.exact_every={exact_every}"]
    one = load_run(train(tiny(*overrides)).folder)
    devices = ["trainer.device=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
    two = train_on_two(tiny(*overrides, *devices, f"paths.runs={tmp_path / 'two'}"))
    assert two.status == "finished"
    np.testing.assert_allclose(two.steps["train_loss"], one.steps["train_loss"], rtol=1e-6)
    np.testing.assert_allclose(two.max_logits["gamma"], one.max_logits["gamma"], rtol=1e-6)
    assert 0 < (one.max_logits["gamma"] < 1).mean() < 1
    exact = one.max_logits["exact"] & two.max_logits["exact"]
    assert exact.any()
    for column in ("value", "value_abs"):
        np.testing.assert_allclose(two.max_logits[column][exact], one.max_logits[column][exact], rtol=1e-6)
    assert (two.experts["load"] == one.experts["load"]).all()
