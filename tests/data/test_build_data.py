import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from muonlab.data import DATA, build_data, list_data
from muonlab.data.__main__ import main
from muonlab.errors import MuonlabError

CONF = Path(__file__).parents[2] / "conf" / "data"


def test_every_corpus_has_a_config_with_its_settings_and_defaults():
    assert list_data() == sorted(path.stem for path in CONF.glob("*.yaml"))
    for name in list_data():
        config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        assert config.pop("name") == name
        # The cache belongs to the machine, not to the corpus: configs say it under `paths`.
        assert config | {"cache": None} == DATA.settings(name)


def test_misspelt_names_and_settings_name_the_near_ones(tmp_path):
    with pytest.raises(MuonlabError, match="unknown data 'shakspeare'; did you mean 'shakespeare'"):
        build_data("shakspeare")
    with pytest.raises(MuonlabError, match="unknown setting of data text 'pth'; did you mean 'path'"):
        build_data("text", pth=tmp_path)


def test_the_command_says_what_is_ready(tmp_path, capsys):
    (tmp_path / "input.txt").write_bytes(b"Now is the winter of our discontent\n" * 10)
    assert main(["text", f"path={tmp_path / 'input.txt'}", "val_fraction=0.5", f"cache={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "train_tokens     180\n" in printed
    assert "train begins     'Now is the winter" in printed
    assert main(["synthetic", "order=1", "train_tokens=50", "val_tokens=50", f"cache={tmp_path}"]) == 0
    assert "entropy_rate     1." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shakespear"], "unknown data 'shakespear'"),
        (["text", "path=/nowhere/at/all"], "there is no file or folder /nowhere/at/all"),
        (["text", "path"], "settings are written name=value, not 'path'"),
    ],
)
def test_the_command_tells_a_mistake_in_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert said in printed
    assert printed.count("\n") == 1


def test_importing_the_package_is_light():
    heavy = {"tokenizers", "datasets", "pandas", "lightning", "mlflow", "hydra"}
    code = f"import sys, muonlab.data; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
