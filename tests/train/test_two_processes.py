"""Two and four processes that share each batch train as one does, with whole weights (DDP) and sharded ones (FSDP2)."""

import multiprocessing
import os
import signal
import socket
import warnings

import numpy as np
import pytest
import torch

from muonlab.record import load_run
from muonlab.train.run import run_folder, train

TAU = 0.15  # some heads of the tiny run pass it, some do not
# In fp64, because fp32's rounding alone grows to 1e-5 within the run, through what Newton-Schulz makes of small
# singular values.
FP64 = ["trainer.precision=fp64", "optimizer.ns_dtype=float64", f"optimizer.tau={TAU}", "trainer.device=cpu"]
MODELS = {
    # Heads' maxima from every attention weight; a norm that clips; weights that are odd to cut.
    "nanogpt_xxs": [
        "model.tied_head=true",
        "trainer.grad_clip=0.5",
        "optimizer.clip_momentum=scale",
        "model.d_model=20",
    ],
    # Bounds between exact maxima; experts, 8 of them, and a router; two micro-batches a step; spectra.
    "moe_xs": [
        "trainer.exact_every=3",
        "trainer.accumulate=2",
        "trainer.spectra_every=4",
        "optimizer.per_head=true",
    ],
}


def run_rank(rank, world, port, config, on_step):
    """One rank as a launcher such as torchrun starts it."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    os.cpu_count = lambda: 4  # of a machine with four cores
    raise SystemExit(train(config, on_step(rank) if on_step else None).signal)


def train_on(world, config, on_step=None):
    """Exit codes and record. Forked, so that Lightning need not be imported again, which takes longer than the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads at a fork
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=run_rank, args=(rank, world, port, config, on_step))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks], load_run(run_folder(config))


def overrides(model):
    return [f"model={model}", *FP64, *MODELS[model]]


@pytest.fixture(scope="module", params=MODELS)
def one(request, tmp_path_factory):
    """The model's name and its run in one process."""
    from tiny_runs import TINY

    from muonlab.cli import compose_config, plain
    from muonlab.train.config import read_config

    place = tmp_path_factory.mktemp("one")
    paths = [f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}"]
    config = read_config(plain(compose_config("train", [*TINY, *paths, *overrides(request.param)])))
    return request.param, load_run(train(config).folder)


def same_run(run, expected):
    """To rounding, in all that is recorded of a step, heads, experts and final metrics included."""
    assert run.status == expected.status == "finished"
    for column in expected.steps.columns.drop("seconds"):
        np.testing.assert_allclose(run.steps[column], expected.steps[column], rtol=1e-6, err_msg=column)
    exact = expected.max_logits["exact"] & run.max_logits["exact"]
    assert exact.any()
    assert 0 < (expected.max_logits["gamma"] < 1).mean() < 1
    for column in ("gamma", "entropy", "one_hot"):
        np.testing.assert_allclose(run.max_logits[column], expected.max_logits[column], rtol=1e-6)
    for column in ("value", "value_abs"):
        np.testing.assert_allclose(
            run.max_logits[column][exact], expected.max_logits[column][exact], rtol=1e-6
        )
    if expected.experts is not None:
        assert (run.experts["load"] == expected.experts["load"]).all()
    for name, value in expected.metrics.items():
        assert run.metrics[name] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_several_processes_follow_one(one, tiny, strategy, world):
    model, expected = one
    config = tiny(*overrides(model), f"trainer.devices={world}", f"trainer.strategy={strategy}")
    codes, run = train_on(world, config)
    assert codes == [0] * world
    same_run(run, expected)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_signal_to_one_rank_stops_all_after_one_step_and_one_process_resumes(one, tiny, strategy):
    """Rank 1 alone gets SIGTERM; the checkpoint is whole, loads with weights_only and at another number of ranks."""
    model, expected = one

    def on_step(rank):
        return lambda step: os.kill(os.getpid(), signal.SIGTERM) if (rank, step) == (1, 5) else None

    several = tiny(*overrides(model), "trainer.devices=2", f"trainer.strategy={strategy}")
    codes, stopped = train_on(2, several, on_step)
    assert codes == [signal.SIGTERM] * 2
    assert (stopped.status, stopped.cause) == ("interrupted", "SIGTERM after step 4")
    checkpoint = torch.load(stopped.folder / "checkpoints/step-00000005.ckpt", weights_only=True)
    assert all(type(value) is torch.Tensor for value in checkpoint["state_dict"].values())
    same_run(load_run(train(tiny(*overrides(model))).folder), expected)


def test_a_run_of_one_process_resumes_in_four_that_shard_it(one, tiny):
    model, expected = one
    alone = tiny(*overrides(model))
    train(alone, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None)
    assert load_run(run_folder(alone)).status == "interrupted"
    codes, run = train_on(4, tiny(*overrides(model), "trainer.devices=4", "trainer.strategy=fsdp2"))
    assert codes == [0] * 4
    same_run(run, expected)


def test_a_finished_run_started_again_returns_on_every_rank(one, tiny):
    model, _ = one
    config = tiny(*overrides(model), "trainer.devices=2", "trainer.strategy=ddp")
    assert [train_on(2, config)[0] for _ in range(2)] == [[0, 0], [0, 0]]
