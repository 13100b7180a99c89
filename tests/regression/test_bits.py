"""A refactor keeps the losses to the bit: the twelve runs of runs.py on this code and on the commit in BASE.

Bits differ between processors, so the reference is computed here: the older commit is taken out of git's history and
trained beside this one. To check against another commit: MUONLAB_BASE=HEAD~3 pytest tests/regression/test_bits.py
"""

import json
import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("runs.py")
BASE = os.environ.get("MUONLAB_BASE") or Path(__file__).with_name("BASE").read_text().split()[0]


def git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True).stdout


def measured(code: Path, folder: Path):
    """The digests of the runs under the code in `code`."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_twelve_runs_have_the_bits_of_the_base_commit(tmp_path):
    try:
        archive = git("archive", BASE, "muonlab", "conf", "analysis", "experiments")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"commit {BASE} is not in this checkout (git fetch --unshallow brings it)")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(tmp_path / "base", filter="data")
    base = measured(tmp_path / "base", tmp_path / "base-runs")
    here = measured(ROOT, tmp_path / "runs")
    assert here.keys() == base.keys()
    changed = [f"{run}: {key}" for run in base for key in base[run] if base[run][key] != here[run][key]]
    assert not changed, f"other bits than at {BASE}: {', '.join(changed)}"
    assert len({json.dumps(run) for run in here.values()}) == len(here), "two runs that cannot be told apart"
