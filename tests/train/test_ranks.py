"""The processes of a run on several devices as they are started: by muonlab, by torchrun, by srun, in a sweep."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gate import __file__ as gate_file
from gate import interpreter

from muonlab.errors import MuonlabError
from muonlab.record import load_run
from muonlab.study.pool import Job, Pool
from muonlab.study.standing import Standing
from muonlab.train.place import Place, find_place
from muonlab.train.ranks import RankLost
from muonlab.train.run import run_folder, train

FP64 = ["model=nanogpt_xxs", "trainer.precision=fp64", "optimizer.ns_dtype=float64", "trainer.device=cpu"]
FP64 += ["trainer.max_steps=40", "trainer.val_every=0", "trainer.checkpoint_every=10"]
FP64 += [
    "optimizer.lookahead=0.3",
    "optimizer.tail_share=0.6",
    "optimizer.tail_from=5",
]  # sharded like the weights
SHARDED = ["trainer.devices=2", "trainer.strategy=fsdp2"]
# Of the kernel: the processes that one has started.
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
SRUN = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "4711", "SLURM_NODELIST": "127.0.0.1"}
BOUND = 30  # seconds in which the loss of one rank ends all


@pytest.fixture
def one(tiny, tmp_path):
    return load_run(train(tiny(*FP64, f"paths.runs={tmp_path / 'one'}")).folder)


def same(run, expected):
    assert run.status == "finished"
    np.testing.assert_allclose(run.steps["train_loss"], expected.steps["train_loss"], rtol=1e-6)
    assert run.metrics["val_loss"] == pytest.approx(expected.metrics["val_loss"], rel=1e-6)


def ranks_of(parent):
    """The ranks that `parent` has started, in the order of their start, without multiprocessing's helpers."""
    children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    words = {pid: set(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")) for pid in children}
    return [pid for pid in children if words[pid] & {b"muonlab.train", b"muonlab.train.ranks"}]


@linux
def test_a_killed_rank_ends_all_in_one_sentence_and_the_run_resumes(tiny, tmp_path, one, capfd, monkeypatch):
    """Rank 1 is killed, then the parent gets the signal of a closed terminal, then rank 0 is killed."""
    config = tiny(*FP64, *SHARDED)
    gate = tmp_path / "gate"
    monkeypatch.setattr(sys, "executable", interpreter(gate, tmp_path))

    def held_at(middle, action):
        """An on_step that calls `action` once `middle` steps are done, before any rank can do another."""

        def on_step(step):
            if step == middle:
                action()
                gate.unlink()

        gate.write_text(str(middle))
        return on_step

    def kill(number, middle):
        begun = []

        def strike():
            begun.append(time.monotonic())
            os.kill(ranks_of(os.getpid())[number], signal.SIGKILL)

        with pytest.raises(RankLost, match=rf"^rank {number} of 2 was ended by SIGKILL, .* resume"):
            train(config, held_at(middle, strike))
        assert time.monotonic() - begun[0] < BOUND

    kill(1, middle=12)
    assert load_run(run_folder(config)).status == "interrupted"
    hung_up = train(config, held_at(22, lambda: signal.raise_signal(signal.SIGHUP)))
    assert (hung_up.status, hung_up.signal) == ("interrupted", signal.SIGHUP)
    assert not ranks_of(os.getpid())
    kill(0, middle=32)
    same(load_run(train(tiny(*FP64)).folder), one)  # in one process, which reads what two wrote
    assert train(config).trained is False
    assert "Traceback" not in "".join(capfd.readouterr())


def command(tiny_overrides, tmp_path, *more):
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    return ["-m", "muonlab.train", *tiny_overrides, *paths, *FP64, *more]


@linux
def test_under_torchrun_a_killed_rank_ends_all_and_the_run_resumes(tiny, tiny_overrides, tmp_path, one):
    gate = tmp_path / "gate"
    gate.write_text("12")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun += [gate_file, str(gate)]
    overrides = command(tiny_overrides, tmp_path, "trainer.devices=2", "trainer.strategy=ddp")
    folder = run_folder(tiny(*FP64))
    agent = subprocess.Popen([*torchrun, *overrides], stderr=subprocess.PIPE, text=True)
    checkpoint = folder / "checkpoints" / "step-00000010.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(ranks_of(agent.pid)[1], signal.SIGKILL)
    gate.unlink()
    killed = time.monotonic()
    errors = agent.communicate(timeout=60)[1]
    assert time.monotonic() - killed < BOUND
    assert agent.returncode != 0
    assert load_run(folder).status in ("interrupted", "running")
    ours = [line for line in errors.splitlines() if "muonlab" in line and "torch" not in line]
    assert not any("Traceback" in line for line in ours)
    same(load_run(train(tiny(*FP64)).folder), one)


def test_under_srun_the_task_of_number_0_is_the_first_and_the_run_is_one(tiny, tiny_overrides, tmp_path, one):
    overrides = command(tiny_overrides, tmp_path, *SHARDED)
    tasks = [
        subprocess.Popen(
            [sys.executable, *overrides],
            env=os.environ
            | SRUN
            | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    folder = run_folder(tiny(*FP64))
    assert printed == [f"finished\nrun: {folder}\n", ""]
    same(load_run(folder), one)


def test_a_run_of_one_device_is_one_process_whatever_a_batch_system_says(tiny, monkeypatch):
    for name, value in (SRUN | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}).items():
        monkeypatch.setenv(name, value)
    assert train(tiny("model=nanogpt_xxs", "trainer.max_steps=2")).status == "finished"


def test_a_run_on_several_devices_in_a_sweep_equals_one_process(tiny, tmp_path, one, monkeypatch):
    """Within a worker that srun started, whose variables are not about the run."""
    for name, value in (SRUN | {"SLURM_NTASKS": "3", "SLURM_PROCID": "2"}).items():
        monkeypatch.setenv(name, value)
    jobs = [Job(tiny(*FP64, "trainer.devices=2", "trainer.strategy=ddp"), "two")]
    results = []
    pool = Pool(1, tmp_path / "logs")
    pool.run(
        lambda: jobs.pop() if jobs else None,
        lambda job, result: results.append((job, result)),
        "two",
        1,
        40,
        Standing,
    )
    [(job, result)] = results
    assert (result.status, job.gauge.steps) == ("finished", 40)
    assert all(0 < value < 10 for value in job.gauge.reading)  # loss and max logit
    same(load_run(result.folder), one)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
            Place(5, 1, 1, 8, "a", 7),
        ),
        (
            {"LOCAL_RANK": "3", "NODE_RANK": "1", "WORLD_SIZE": "8", "MASTER_PORT": "7"},
            Place(7, 3, 1, 8, port=7),
        ),
        (
            {
                "SLURM_NTASKS": "8",
                "SLURM_NNODES": "2",
                "SLURM_PROCID": "6",
                "SLURM_LOCALID": "2",
                "SLURM_NODEID": "1",
            }
            | {"SLURM_JOB_ID": "123456", "SLURM_NODELIST": "gpu[03-05,9],login1"},
            Place(6, 2, 1, 8, "gpu03", 18456),
        ),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "interactive"}, None),
    ],
)
def test_a_process_finds_its_place_in_the_environment(environment, place):
    assert find_place(4, environment) == place
    assert find_place(1, environment) == Place()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "3"},
            "WORLD_SIZE says that 3 processes were started, but trainer.devices=2",
        ),
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            "srun started 4 tasks on 1 machines, but trainer.devices=2",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"},
            "torchrun started 4 processes on this machine",
        ),
        ({"LOCAL_RANK": "first"}, "\\$LOCAL_RANK must be a whole number, not 'first'"),
    ],
)
def test_another_number_of_processes_than_devices_is_one_sentence(environment, message):
    with pytest.raises(MuonlabError, match=message):
        find_place(2, environment)


@pytest.mark.parametrize("override", ["trainer.compile=true", "trainer.precision=fp16", "trainer.devices=1"])
def test_what_sharding_cannot_do_is_one_sentence(tiny, override):
    with pytest.raises(MuonlabError, match=r"^trainer\.strategy=fsdp2 "):
        tiny(*SHARDED, override)
