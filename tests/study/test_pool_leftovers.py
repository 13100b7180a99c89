"""What multiprocessing leaves behind when its process is killed is removed by the next command."""

import os
import signal
import subprocess
import sys

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
    processes[0][0].send_signal(signal.SIGKILL)
    processes[0][0].communicate()
    processes.append(start())
    living = {os.path.basename(folder) for _, folder in processes[1:]}
    assert {path.name for path in tmp_path.iterdir()} == living | {"pymp-of-somebody-else"}
    for process, _ in processes[1:]:
        process.kill()
        process.communicate()
