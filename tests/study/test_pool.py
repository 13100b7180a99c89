"""The processes of a study: what they leave behind when they are killed, and which GPUs are theirs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from muonlab.progress import Progress
from muonlab.study import pool
from muonlab.study.child import own_gpus, visible_gpus

SERVER = """
import time
from multiprocessing.util import get_temp_dir
from muonlab.study import pool
pool.forkserver.ensure_running = lambda: None  # seconds of imports
pool.server()
print(get_temp_dir(), flush=True)
time.sleep(60)
"""


def test_the_sockets_of_a_killed_parent_are_removed_and_those_of_a_living_one_are_not(tmp_path):
    (tmp_path / "pymp-of-somebody-else").mkdir()

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        return process, process.stdout.readline().strip()

    processes = [start(), start()]
    (marked,) = [
        path / pool.MARK for path in tmp_path.glob("pymp-*") if path.name == os.path.basename(processes[0][1])
    ]
    assert marked.read_text() == "", "nothing that a full disk could cut"
    processes[0][0].send_signal(signal.SIGKILL)
    processes[0][0].communicate()
    processes.append(start())
    living = {os.path.basename(folder) for _, folder in processes[1:]}
    assert {path.name for path in tmp_path.iterdir()} == living | {"pymp-of-somebody-else"}
    for process, _ in processes[1:]:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("devices", "gpus", "places"),
    [
        (1, "0,1,2", ["0", "1", "2", "0"]),
        (2, "0,1,2,3", ["0,1", "2,3", "0,1"]),
        (2, "4,7,9", ["4,7", "4,7"]),
        (4, "0,1", ["0,1"]),  # too few: the run says so
    ],
)
def test_runs_at_once_have_gpus_of_their_own(devices, gpus, places):
    assert [",".join(own_gpus(i, devices, gpus.split(","))) for i in range(len(places))] == places


def test_an_empty_list_of_gpus_hides_them_all(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8932f937")
    assert visible_gpus() == ["3", "GPU-8932f937"]


def test_a_clock_that_is_set_back_or_forward_shows_in_no_progress_bar(monkeypatch, capsys):
    with Progress(total=10, mininterval=0, desc="runs") as bar:
        for hours in (-5, 5):
            monkeypatch.setattr("tqdm.std.time", lambda hours=hours: time.time() + 3600 * hours)
            bar.update(2)
            assert 0 <= bar.format_dict["elapsed"] < 60
    assert ":00" not in capsys.readouterr().err.replace("00:00", "")
