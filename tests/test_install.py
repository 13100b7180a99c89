"""install.py: uv gets pip's own settings, and pip installs wherever uv cannot."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
CALL = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    print(json.dumps([{name!r}, sys.argv[1:], os.environ.get("SSL_CERT_FILE", "")]), file=file)
if sys.argv[1:2] == ["config"] or sys.argv[2:3] == ["config"]:
    print({settings!r}, end="")
print("first line\\nsecond line", file=sys.stderr)
sys.exit({code} if "config" not in sys.argv else 0)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(settings, uv, pip) -> (exit code, calls): runs install.py with programs that only write down how they
    were called. `settings`: what `pip config list` prints. `uv`, `pip`: their exit codes; None: there is no uv."""
    spec = importlib.util.spec_from_file_location("install_script", ROOT / "install.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    log = tmp_path / "calls"

    def program(name, code, settings=""):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        text = CALL.format(python=PYTHON, log=str(log), name=name, code=code, settings=settings)
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def run(settings="", uv=0, pip=0):
        monkeypatch.setattr(script, "PIP", [program("pip", pip, settings)])
        monkeypatch.setattr(script.sys, "executable", str(tmp_path / "none" / "python"))
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        if uv is not None:
            program("uv", uv)
        code = script.main()
        calls = [json.loads(line) for line in log.read_text().splitlines()]
        return code, [call for call in calls if "config" not in call[1]]

    run.script = script
    return run


SETTINGS = """:env:.cert='/certificates.pem'
:env:.find-links='/wheels'
global.extra-index-url='\\nfile:///one\\nfile:///two'
global.find-links='/overruled'
install.constraint='/limits.txt'
list.format='columns'
"""


def test_uv_is_told_what_pip_is_told_and_installs_the_lock_and_then_muonlab(install, tmp_path, capsys):
    code, calls = install(SETTINGS)
    python = str(tmp_path / "none" / "python")
    told = ["--index-strategy", "unsafe-best-match"]
    told += ["--extra-index-url", "file:///one", "--extra-index-url", "file:///two"]
    told += ["--find-links", "/wheels", "--constraint", "/limits.txt"]
    begin = ["pip", "install", "--quiet", "--python", python, *told]
    assert code == 0
    assert calls == [
        ["uv", [*begin, "-r", "requirements.lock"], "/certificates.pem"],
        ["uv", [*begin, "--no-deps", "--no-build-isolation", "-e", "."], "/certificates.pem"],
    ]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "uv", "reason"),
    [
        ("", 3, "uv failed (first line)"),
        ("", None, "it found no uv"),
        ("install.no-binary=':all:'\n", 0, "uv has no counterpart of its setting no-binary"),
    ],
)
def test_pip_installs_where_uv_cannot_and_one_sentence_says_why(install, capsys, settings, uv, reason):
    code, calls = install(settings, uv)
    assert code == 0
    mine = [arguments for name, arguments, _ in calls if name == "pip"]
    if uv is None:  # it was tried to get one
        assert mine.pop(0) == ["install", "--quiet", install.script.UV]
    assert mine == [
        ["install", "--quiet", "-r", "requirements.lock"],
        ["install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."],
    ]
    assert capsys.readouterr().err == f"pip installs the packages, which takes minutes: {reason}\n"
    assert sum(name == "uv" for name, _, _ in calls) == (1 if uv else 0)


def test_the_exit_code_is_pips_where_both_fail(install):
    assert install(uv=1, pip=7)[0] == 7


def test_pips_own_files_and_environment_are_read_as_pip_reads_them(tmp_path):
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nfind_links = /a\n  /b\nno-index = yes\n[install]\nproxy = http://here:1\n")
    code = "import install, json; print(json.dumps(install.translated(install.pip_settings())))"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment = kept | {
        "PIP_CONFIG_FILE": str(file),
        "PIP_EXTRA_INDEX_URL": "file:///c",
        "PIP_TIMEOUT": "9",
    }
    done = subprocess.run(
        [PYTHON, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    options, variables = json.loads(done.stdout)
    # The machine's own pip.conf may add to it.
    assert "--no-index" in options
    begin = options.index("/a") - 1
    assert options[begin : begin + 4] == ["--find-links", "/a", "--find-links", "/b"]
    assert options[options.index("file:///c") - 1] == "--extra-index-url"
    assert variables | {"UV_HTTP_TIMEOUT": "9", "ALL_PROXY": "http://here:1"} == variables
