import subprocess
import sys

import pytest

from muonlab.errors import MuonlabError
from muonlab.record import load_run


def test_a_folder_without_a_run_gives_one_sentence(tmp_path):
    with pytest.raises(MuonlabError, match=r"no run in .*nowhere: there is no such folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(MuonlabError, match=r"no run in .*: it has no config\.yaml"):
        load_run(tmp_path)


def test_a_damaged_file_is_named(record):
    (record.folder / "status.json").write_text('{"status": "runn')
    with pytest.raises(MuonlabError, match=r"status\.json is not JSON"):
        load_run(record.folder)


def test_reading_a_record_needs_neither_torch_nor_mlflow_nor_lightning(record, append_steps):
    append_steps(record, range(3))
    record.finish("finished")
    code = f"""
import sys
from muonlab.record import load_run
run = load_run({str(record.folder)!r})
assert len(run.steps) == 3 and len(run.max_logits) == 18 and len(run.events) == 0
print([name for name in ("torch", "mlflow", "lightning", "hydra", "optuna") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_knows_its_identity(record):
    assert len(load_run(record.folder).identity) == 10
