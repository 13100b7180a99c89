"""What docs/slurm.md says works: its array script stops and requeues, and its submitit code fills a study."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_designs import search

from muonlab.record import load_run
from muonlab.train.run import run_folder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")


def block(language):
    """The one fenced block of the page in a language."""
    [text] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.S | re.M)
    return text


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("sent", "code", "requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False), (None, 7, False)]
)
def test_the_array_script_stops_its_worker_and_requeues_itself(tmp_path, sent, code, requeued):
    said = tmp_path / "said"
    program(
        tmp_path / ".venv/bin/python",
        f'echo "$@" > {said}; [ "$SENT" ] || exit 7; trap "echo stopped >> {said}; exit 143" TERM\n'
        "touch started; while true; do sleep 0.05; done\n",
    )
    program(tmp_path / "bin/scontrol", f'echo "scontrol $@" >> {said}\n')
    script = tmp_path / "worker.sh"
    script.write_text(block("slurm"))
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    environment["SENT"] = "yes" if sent else ""
    process = subprocess.Popen(["bash", script, "studies/x"], cwd=tmp_path, env=environment)
    if sent:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        process.send_signal(sent)
    assert process.wait(60) == code
    lines = said.read_text().splitlines()
    assert lines[0] == "-m muonlab.worker studies/x --workers 1"
    assert lines[1:] == ["stopped"] * bool(sent) + ["scontrol requeue 17"] * requeued


def test_two_workers_of_submitit_fill_a_study(study, monkeypatch):
    made = study({"search": {"search": search(trials=2), "seeds": [0]}})
    made.save()
    page = {}
    exec(compile(block("py"), "docs/slurm.md", "exec"), page)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path[1:]]))
    jobs = page["start_workers"](str(made.folder), 2, cluster="local")
    for job in jobs:
        job.wait()
    printed = [job.stderr() for job in jobs]
    del job, jobs[:]  # submitit looks after its jobs when they are collected
    gc.collect()
    statuses = [load_run(run_folder(slot.config)).status for slot in made.slots()]
    assert statuses == ["finished"] * 2, printed
