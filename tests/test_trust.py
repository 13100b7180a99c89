"""Nothing that is loaded may run code, and nothing that is started listens to other machines."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("muonlab", "analysis", "benchmarks", "experiments")
    for path in (ROOT / folder).rglob("*.py")
)


def calls(text):
    """(dotted name, {keyword: source of its value}) of every call in a Python source."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def dangers(text):
    """The calls that would run code found in a file."""
    found = []
    for name, keywords in calls(text):
        if name in ("torch.load", "load_checkpoint") and keywords.get("weights_only") != "True":
            found.append(name)
        if (
            name.endswith("trainer.fit")
            and keywords.get("ckpt_path")
            and keywords.get("weights_only") != "True"
        ):
            found.append(name)
        if keywords.get("allow_pickle", "False") != "False":
            found.append(name)
        if re.fullmatch(
            r"(pickle|cloudpickle|dill|joblib|marshal|shelve)\.(load|loads|open|Unpickler)", name
        ):
            found.append(name)
        if name in ("pd.read_pickle", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
            found.append(name)
        if name == "yaml.load" and "Loader" in keywords and "Safe" not in keywords["Loader"]:
            found.append(name)
    return found


def test_no_file_that_is_read_can_run_code():
    assert len(SOURCES) > 100
    found = {path: dangers(path.read_text(encoding="utf-8")) for path in SOURCES}
    allowed = {
        "muonlab/plugins.py": ["exec"],  # a file of the user's own, which the command line names
        "muonlab/optim/conformance.py": ["pickle.loads"],  # of what the line before has pickled
    }
    assert {str(path.relative_to(ROOT)): names for path, names in found.items() if names} == allowed


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(data)",
        "trainer.fit(module, ckpt_path=path)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_a_danger_is_seen(text):
    assert dangers(text)


def test_nothing_listens_beyond_this_machine():
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    every = "0.0.0" + ".0"
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".sh", "") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert every not in text, name
            for line in text.splitlines():
                if re.search(r"\bmlflow (ui|server)\b.*--host", line):
                    assert "127.0.0.1" in line, name
    pages = (ROOT / "muonlab" / "ui.py").read_text(encoding="utf-8")
    assert 'HOST = "127.0.0.1"' in pages
    assert pages.count("host=HOST") + pages.count('"--host", HOST') == 2
