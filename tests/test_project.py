"""The project's own files: dependencies are declared and pinned, and what runs elsewhere says what it should."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ["3.11", "3.12", "3.13"]
OURS = {"muonlab", "analysis"}
DISTRIBUTIONS = metadata.packages_distributions()


def names(requirements):
    """The canonical names of a list of requirements."""
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def lines(path):
    """A requirements file without its comments."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return [line for raw in text.splitlines() if (line := raw.partition("#")[0].strip())]


NEEDED = names(PROJECT["dependencies"])
OPTIONAL = names(line for extra in PROJECT["optional-dependencies"].values() for line in extra)
LOCK = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines("requirements.lock")}


def imports(path):
    """(top-level name, whether the import stands outside of every function) of what a file imports from others."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    within = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    beside = {other.stem for other in path.parent.glob("*.py")}
    for node in ast.walk(tree):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [node.module]
        for name in (module.partition(".")[0] for module in found):
            if name not in sys.stdlib_module_names | OURS | beside:
                yield name, id(node) not in within


def distributions(name):
    """The distributions that may hold a top-level module, by its own name where none is installed."""
    return {canonicalize_name(found) for found in DISTRIBUTIONS.get(name, [name])}


def third_party(*folders):
    """{(module, at the top of the file): a file that imports it} of the Python files below the folders."""
    found = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            found |= dict.fromkeys(imports(path), path)
    return found


# ---------------------------------------------------------------------- dependencies
def test_what_the_packages_import_is_declared():
    undeclared = {
        module: str(path.relative_to(ROOT))
        for (module, at_top), path in third_party("muonlab", "analysis", "experiments").items()
        if not distributions(module) & (NEEDED if at_top else NEEDED | OPTIONAL)
    }
    assert not undeclared


def test_what_the_benchmarks_and_tests_import_is_declared():
    known = NEEDED | OPTIONAL | names(lines("benchmarks/parity-requirements.txt"))
    helpers = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    helpers |= {path.parent.name for path in (ROOT / "tests").rglob("__init__.py")}
    undeclared = {
        module: str(path.relative_to(ROOT))
        for (module, _), path in third_party("benchmarks", "tests").items()
        if module not in helpers and not distributions(module) & known
    }
    assert not undeclared


def test_what_is_needed_is_imported():
    imported = {name for module, _ in third_party("muonlab", "analysis") for name in distributions(module)}
    assert imported >= NEEDED


def test_an_undeclared_import_is_seen(tmp_path):
    path = tmp_path / "late.py"
    path.write_text("import yaml.nodes, os, muonlab\ndef f():\n    from PIL.Image import open\n")
    assert set(imports(path)) == {("yaml", True), ("PIL", False)}
    assert distributions("PIL") == {"pillow"}


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_a_dependency_is_pinned_within_its_range(line):
    wanted = Requirement(line)
    [pin] = LOCK[canonicalize_name(wanted.name)].specifier
    assert pin.operator == "=="
    assert pin.version in wanted.specifier


def test_the_lock_holds_everything_that_its_packages_need():
    missing = {}
    for name in LOCK:
        try:
            wanted = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue
        for each in wanted:
            here = each.marker is None or each.marker.evaluate({"extra": ""})
            # torch's own metadata pins the packages of a CUDA machine.
            if here and name != "torch" and canonicalize_name(each.name) not in LOCK:
                missing.setdefault(each.name, set()).add(name)
    assert not missing


# ---------------------------------------------------------------------- platforms
def test_the_supported_pythons_are_the_same_everywhere():
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(">=3.11,<3.14")
    prefix = "Programming Language :: Python :: "
    assert [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)] == PYTHONS
    assert "(3, 11) <= sys.version_info[:2] < (3, 14)" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert workflow()["strategy"]["matrix"]["python"] == PYTHONS


def test_linux_and_macos_are_supported_and_tested():
    prefix = "Operating System :: "
    systems = {c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)}
    assert systems == {"POSIX :: Linux", "MacOS"}
    assert workflow()["strategy"]["matrix"]["os"] == ["ubuntu-latest", "macos-latest"]


# ---------------------------------------------------------------------- checks of a push and of a commit
def workflow():
    """The job of the workflow that runs on every system."""
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["jobs"]["tests"]


def test_the_workflow_runs_the_linters_and_the_tests_on_the_whole_history():
    steps = workflow()["steps"]
    assert [step["run"] for step in steps if step.get("run", "").startswith("make")] == [
        "make setup PYTHON=python",
        "make lint",
        "make test",
    ]
    [checkout] = [step for step in steps if "checkout" in step.get("uses", "")]
    assert checkout["with"]["fetch-depth"] == 0
    [index] = [step for step in steps if "PIP_EXTRA_INDEX_URL" in step.get("run", "")]
    assert index["if"] == "runner.os == 'Linux'"


def test_the_hooks_run_the_locked_tools():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    for tool in ("ruff", "ruff-format", "mypy"):
        assert hooks[tool]["entry"].startswith(f".venv/bin/python -m {tool.partition('-')[0]}")
        assert tool.partition("-")[0] in LOCK


@pytest.mark.parametrize(
    ("hook", "text", "found"),
    [
        ("trailing-whitespace", "a \nb\n", True),
        ("trailing-whitespace", "a\n\nb\n", False),
        ("end-of-file", "a", True),
        ("end-of-file", "a\n\n", True),
        ("end-of-file", "a\n", False),
        ("end-of-file", "", False),
        ("merge-conflict", "a\n>>>>>>> b\n", True),
        ("merge-conflict", "=======\n", False),
    ],
)
def test_a_hook_finds_its_fault(hook, text, found):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    [entry] = [h["entry"] for repo in config["repos"] for h in repo["hooks"] if h["id"] == hook]
    assert bool(re.search(entry, text, re.MULTILINE)) == found


# ---------------------------------------------------------------------- licence, citation, changelog
def test_the_licence_is_the_one_that_is_declared():
    assert PROJECT["license"] == "MIT"
    [path] = PROJECT["license-files"]
    assert (ROOT / path).read_text(encoding="utf-8").startswith("MIT License\n\nCopyright (c) 2026 muonlab")
    assert citation()["license"] == "MIT"


def citation():
    """CITATION.cff."""
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_citation_is_of_the_last_release_and_has_what_its_format_demands():
    assert {"cff-version", "message", "title", "authors"} <= citation().keys()
    assert all("name" in author for author in citation()["authors"])
    version, date = releases()[0]
    assert (citation()["version"], citation()["date-released"]) == (version, date)


def releases():
    """[(version, date)] of CHANGELOG.md, the last one first."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)


def test_the_changelog_has_the_form_that_it_names():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == ["[Unreleased]", *(f"[{version}] - {date}" for version, date in releases())]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


def test_the_version_in_work_is_above_the_last_release():
    assert Version(PROJECT["version"]) > Version(releases()[0][0])


# ---------------------------------------------------------------------- make
def make(*arguments):
    """make in the checkout, free of a make that runs these tests."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def commands(*arguments):
    """The same without setting up, and with a Python that prints its arguments as JSON."""
    say = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    return make("-o", "setup", f"RUN={say}", *arguments)


SETTINGS = [
    "search.optimizers.muonclip.space.lr='interval(1e-3,1e-1)'",
    "study=narrow",
    "optimizer.lr_scale={query: 0.1,  key: 0.2}",
    "optimizer.windows=[[0, 5], [10, null]]",
    """name="it's" 'two'""",
    "paths.cache=${paths.runs}/cache",
    r"data.path=C:\text files\ ",
    "data.name=`echo no` $(echo no) $HOME & | ; * ? # !",
    "+experiment=switch",
    "++model.extra=1",
    "share=100%",
]


@pytest.mark.parametrize("target", ["data", "smoke", "sweep", "ablation", "evidence"])
def test_make_passes_settings_on_to_the_letter_and_in_order(target):
    bare = json.loads(commands(target).stdout)
    given = json.loads(commands(target, *SETTINGS).stdout)
    assert given == [*bare, *SETTINGS]


def test_what_make_cannot_read_goes_into_args():
    done = commands("sweep", "study=x", "ARGS=~search.optimizers.adamw --cfg 'a b'")
    assert json.loads(done.stdout)[2:] == ["study=x", "~search.optimizers.adamw", "--cfg", "a b"]


def test_make_refuses_settings_that_a_target_would_ignore():
    done = commands("figures", "study=a b")
    assert done.returncode == 2
    assert "make figures takes no settings such as study=a b" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("version", ["3.10.4", "3.14.0"])
def test_make_refuses_a_python_that_is_too_old_or_too_new(version, tmp_path):
    fake = tmp_path / "python"
    check = f"import sys; sys.version_info = {tuple(map(int, version.split('.')))}; exec(sys.argv[2])"
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}" && exit\nexec {sys.executable} -c "{check}" "$@"\n'
    )
    fake.chmod(0o755)
    done = make("setup", f"PYTHON={fake}", f"VENV={tmp_path}/venv")
    assert done.returncode == 2
    assert f"muonlab needs Python 3.11 to 3.13, not Python {version}" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_every_target_is_in_the_help_and_phony():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", text, re.MULTILINE)[1].replace("\\\n", " ").split()
    assert sorted(targets) == sorted(phony)
    assert re.findall(r"^  make (\S+)  +\S", make("help").stdout, re.MULTILINE) == targets


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is tracked is known to git")
def test_no_tracked_file_is_a_link_and_what_is_made_is_ignored_whatever_it_is():
    """A link to a folder of one machine is not a folder to .gitignore, and hangs in every clone."""
    listed = subprocess.run(
        ["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert not [line for line in listed if line.startswith("120000")]
    for name in (".cache", ".venv", "runs", "studies"):
        ignored = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", name], cwd=ROOT)
        assert ignored.returncode == 0, name
