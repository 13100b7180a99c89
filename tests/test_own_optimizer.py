"""The optimizer of the README, a file outside of the repository: checked, resumed, swept, compared, removed."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from test_readme import carry_out, own_optimizer

from muonlab.record import load_run

STEPS = 40


@pytest.fixture
def command(tmp_path, tiny_overrides, monkeypatch, capfd):
    """command(module, *arguments) -> (exit code, output, errors) of a command in a folder that has mine.py; `tiny` adds
    the overrides of a tiny run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(own_optimizer())

    def run(module, *arguments, tiny=True):
        code = carry_out(["-m", module, *arguments, *(tiny_overrides if tiny else ())], monkeypatch)
        return code, *capfd.readouterr()

    return run


def test_a_file_of_ones_own_goes_the_whole_way(command, own_registries, tiny_overrides, tmp_path):
    code, out, err = command("muonlab.optim.check", "mine.py:mine", tiny=False)
    assert code == 0, out + err
    assert "resumed training is equal to the bit" in out
    assert "FAILS" not in out

    # killed and resumed: as if nothing had happened
    mine = ["plugins=[mine.py]", "optimizer=mine"]
    longer = [o for o in tiny_overrides if "max_steps" not in o] + [*mine, f"trainer.max_steps={STEPS}"]
    train = [sys.executable, "-m", "muonlab.train", *longer]
    killed = subprocess.Popen([*train, "trainer.batch_size=64"], cwd=tmp_path)
    while not list(tmp_path.glob("runs/*/checkpoints/step-*8.ckpt")) and killed.poll() is None:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    [folder] = (tmp_path / "runs").glob("mine-*")
    assert load_run(folder).status != "finished"
    again = [*longer, "trainer.batch_size=64"]
    assert command("muonlab.train", *again, tiny=False)[0] == 0
    assert command("muonlab.train", *again, "paths.runs=straight", tiny=False)[0] == 0
    resumed, straight = load_run(folder), load_run(tmp_path / "straight" / folder.name)
    assert resumed.status == "finished"
    assert resumed.metrics == straight.metrics
    pd.testing.assert_series_equal(
        resumed.steps["train_loss"], straight.steps["train_loss"], check_exact=True
    )

    # swept by two workers
    ranges = "{lr: 'tag(log, interval(1e-4, 1e-2))', weight_decay: 'choice(0.0, 0.1)'}"
    space = f"{{published: {{lr: 1e-3, weight_decay: 0.1}}, space: {ranges}}}"
    search = [
        "search=smoke",
        "search.workers=2",
        "~search.optimizers.muon",
        "~search.optimizers.muonclip",
        "study=own",
    ]
    code, out, err = command("muonlab.sweep", *mine[:1], f"+search.optimizers.mine={space}", *search)
    assert code == 0, out + err
    assert "The best setting of each optimizer on the fresh seeds 1, 2" in out
    code, out, _ = command("muonlab.worker", "studies/own", tiny=False)
    assert (code, out.strip()) == (0, "no open slot is left in own")

    # compared
    few = [o for o in tiny_overrides if o.startswith(("data", "model.context", "tracking", "trainer.probe"))]
    code, out, err = command("muonlab.experiment", "compare", *mine, "scale=smoke", *few, tiny=False)
    assert code == 0, out + err
    for asked in (
        "learns faster than AdamW",
        "explodes",
        "spikes",
        "is harmless",
        "takes less time",
        "keeps less state",
    ):
        assert asked in out
    assert (tmp_path / "results" / "compare-mine-smoke" / "rates.png").exists()

    # removed
    (tmp_path / "mine.py").unlink()
    code, out, err = command("muonlab.train", *mine)
    assert (code, out) == (2, "")
    assert err.startswith(
        "muonlab: plug-in mine.py does not exist; each run that used it keeps a copy as plugins/mine.py"
    )
    assert len(err.splitlines()) == 1
