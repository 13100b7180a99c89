"""The short form of `make chaos`, and that its verdict sees what it is there to see."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.study import SHORT, Places
from chaos.verdict import judge

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc"),
]
SET_TRIAL_STATE_VALUES = 6  # Optuna's number for the end of an attempt, in its journal
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """(the finished command, its folder, which has the undisturbed study)."""
    folder = tmp_path_factory.mktemp("chaos")
    words = [
        sys.executable,
        "-m",
        "chaos",
        "--short",
        "--seed",
        "7",
        "--faults",
        "5",
        "--folder",
        str(folder),
    ]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=600
    )
    return done, folder


@pytest.fixture
def twin(short):
    """The undisturbed study."""
    return Places(short[1] / "twin-sweep" / "disk", short[1] / "twin-sweep")


@pytest.fixture
def copy(twin, tmp_path):
    """The same, to be damaged."""
    shutil.copytree(twin.disk, tmp_path / "disk")
    shutil.copytree(twin.output, tmp_path / "output", ignore=shutil.ignore_patterns("disk"))
    return Places(tmp_path / "disk", tmp_path / "output")


def test_a_study_survives_five_faults(short):
    done, _ = short
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_study_equals_itself(copy, twin):
    assert judge(copy, twin, SHORT) == []


def a_point_twice(places):
    with sqlite3.connect(places.tracking) as connection:
        columns = "key, value, timestamp, run_uuid, step, is_nan"
        changed = columns.replace("timestamp", "timestamp + 1")
        connection.execute(
            f"INSERT INTO metrics ({columns}) SELECT {changed} FROM metrics WHERE key = 'loss/train' LIMIT 1"
        )


def a_point_less(places):
    with sqlite3.connect(places.tracking) as connection:
        connection.execute("DELETE FROM metrics WHERE key = 'loss/train' AND step = 3")


def a_run_that_never_ends(places):
    with sqlite3.connect(places.tracking) as connection:
        connection.execute(
            "UPDATE runs SET status = 'RUNNING' WHERE run_uuid = (SELECT min(run_uuid) FROM runs)"
        )


def some_run(places):
    return min(places.runs.glob("muon-*/status.json")).parent


def no_record(places):
    shutil.rmtree(some_run(places))


def a_second_record(places):
    shutil.copytree(some_run(places), places.runs / "muon-again")


def another_metric(places):
    path = some_run(places) / "status.json"
    state = json.loads(path.read_text())
    state["metrics"]["val_loss"] += 1e-15
    path.write_text(json.dumps(state))


def other_weights(places):
    other = max(places.runs.glob("muon-*/checkpoints/*.ckpt"))
    shutil.copy(other, max((some_run(places) / "checkpoints").glob("*.ckpt")))


def a_trace_cut(places):
    import pyarrow.parquet as pq

    path = some_run(places) / "traces" / "steps.parquet"
    pq.write_table(pq.read_table(path).slice(0, 70), path)


def no_queue(places):
    journal = places.study / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    ends = [i for i, line in enumerate(lines) if json.loads(line)["op_code"] == SET_TRIAL_STATE_VALUES]
    journal.write_bytes(b"".join(lines[: ends[-1]]))


def a_temporary_file(places):
    (some_run(places) / ".status.json.7.tmp").write_text("{")


def a_lease(places):
    (some_run(places) / "lease-000001").write_text("{}")


def a_traceback(places):
    (places.output / "worker-001.log").write_text(
        "Traceback (most recent call last):\n  x\nKeyError: 'val_loss'\n"
    )


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (a_point_twice, "doubled"),
        (a_point_less, "lost"),
        (a_run_that_never_ends, "lost"),
        (no_record, "lost"),
        (a_second_record, "doubled"),
        (another_metric, "different"),
        (other_weights, "different"),
        (a_trace_cut, "different"),
        (no_queue, "lost"),
        (a_temporary_file, "left behind"),
        (a_lease, "left behind"),
        (a_traceback, "traceback"),
    ],
)
def test_the_verdict_sees(copy, twin, damage, kind):
    damage(copy)
    assert kind in {violation.kind for violation in judge(copy, twin, SHORT)}
