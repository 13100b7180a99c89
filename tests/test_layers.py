"""The layout is the architecture: imports point downwards only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = {"errors", "registry", "layout", "runtime", "settings", "command", "begin", "progress", "plugins"}
# What each package may import of muonlab, besides itself and SHARED; "analysis" is the package of that name.
ALLOWED = {
    "data": {"cli"},  # its command reads Hydra's grammar
    "models": {"cli"},  # its command reads conf
    "optim": set(),
    "record": set(),
    "train": {"data", "models", "optim", "record", "cli"},
    "study": {"data", "train", "record", "cli", "plugin_options", "analysis"},
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "analysis":
                found.add("analysis")
            if parts[0] == "muonlab" and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package):
    files = list((ROOT / "muonlab" / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= ALLOWED[package] | SHARED | {package}, path


def test_analysis_reads_records_only():
    for path in (ROOT / "analysis").rglob("*.py"):
        assert imported(path) <= {"record", "errors", "command", "settings", "analysis"}, path


def test_what_everybody_uses_uses_nobody():
    for name in SHARED:
        module = ROOT / "muonlab" / f"{name}.py"
        for path in [module] if module.exists() else module.with_suffix("").glob("*.py"):
            assert imported(path) <= SHARED, path


def test_nothing_is_imported_from_a_command():
    """What a command's file holds is for the command line; the library is elsewhere."""
    commands = {"sweep", "experiment", "worker"}
    for path in [*(ROOT / "muonlab").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "__main__ import" not in text, path
        assert not imported(path) & commands, path
