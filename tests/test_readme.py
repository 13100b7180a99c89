"""Every command and snippet of every page is carried out as it is written, at a tiny size where it would take long.

page_lines.TABLE says how, line by line. A line that it does not know fails, and so does an entry that no page has
any more.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import yaml
from page_lines import TABLE, Compose, Look, Run

from muonlab.cli import compose_config, plain
from muonlab.errors import MuonlabError
from muonlab.record import load_run
from muonlab.train.config import read_config

ROOT = Path(__file__).parents[1]
# CHANGELOG.md tells of commands that are gone, and results/README.md has one for each experiment: see below.
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "experiments/*.md", "muonlab/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
PROGRAMS = ("make", "python", "pip", "pipx", "pytest", "source", "pre-commit", "git", "MUONLAB_BASE=HEAD~3")


# ---------------------------------------------------------------------- reading pages
def blocks(page, *languages):
    """The fenced blocks of a page in one of the languages."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [text for language, text in fences if language in languages]


def spans(page):
    """The code within its sentences."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]


def lines(page):
    """Every command of a page, in blocks and in sentences, without its comment."""
    typed = [line for text in blocks(page, "sh", "bash", "shell", "console") for line in commands(text)]
    typed += [line for text in blocks(page, "") for line in commands(text) if line.split()[0] in PROGRAMS]
    return typed + [span for span in spans(page) if span.split()[0] in PROGRAMS and len(span.split()) > 1]


def commands(text):
    """The lines of a block, continued ones in one."""
    stripped = [
        re.sub(r"(^|\s+)#.*$", "", line).strip() for line in re.sub(r" *\\\n *", " ", text).splitlines()
    ]
    return [line.removeprefix("$ ") for line in stripped if line]


def own_optimizer():
    """The optimizer that a page adds."""
    [code] = [text for text in snippets() if "register_optimizer" in text]
    return code


# ---------------------------------------------------------------------- carrying out
def python_arguments(line):
    """What a line hands to Python, settings to the letter: make is asked for what it would run."""
    words = shlex.split(line)
    if words[0] == "python":
        return words[1:]
    say = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-o", "setup", f"RUN={say}", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    return json.loads(done.stdout)


def small(extra, arguments, tiny):
    """The words of `extra` with its names filled in, but for groups that the line chooses: Hydra takes each once."""
    data = [override for override in tiny if override.startswith("data")]
    size = [override for override in tiny if not override.startswith("data")]
    search = [*data, *size, "trainer.max_steps=3", "search.trials=1", "search.replicate_seeds=[1,2]"]
    filled = {"DATA": data, "SIZE": size, "SEARCH": search}
    groups = {word.partition("=")[0] for word in arguments if "=" in word}
    words = [word for name in extra.split() for word in filled.get(name, [name])]
    return [word for word in words if "." in word.partition("=")[0] or word.partition("=")[0] not in groups]


def carry_out(arguments, monkeypatch):
    """The exit code of `python arguments...`, in this process, which has imported everything already."""
    words = arguments[1:] if arguments[0] == "-m" else arguments
    monkeypatch.setattr(sys, "argv", list(words))
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a process of its own
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        try:
            if arguments[0] == "-m":
                runpy.run_module(arguments[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


def compose(arguments):
    """Check the settings of a command without running it."""
    module, overrides = arguments[1], arguments[2:]
    if module == "muonlab.train":
        assert read_config(plain(compose_config("train", overrides))).trainer.max_steps > 1
    elif module == "muonlab.sweep":
        from muonlab.study.reading import read_experiment
        from muonlab.sweep import make_study, with_quoted_ranges

        design, overrides = read_experiment("sweep"), with_quoted_ranges(overrides)
        config = plain(compose_config("sweep", [*design.common, *overrides]))
        assert make_study(design, config, overrides).slots()
    elif module == "muonlab.experiment":
        from muonlab.experiment import make_study

        assert make_study(overrides[0], overrides[1:], Path("studies"), None).slots()
    else:
        assert module == "muonlab.data"
        from muonlab.data import DATA
        from muonlab.data.__main__ import read_settings
        from muonlab.settings.check import build

        assert build(DATA.section(overrides[0]), read_settings(overrides[1:]), "data")


@pytest.fixture
def trained(tiny):
    """The folder of a tiny run of a mixture of experts."""
    from muonlab.train.run import train

    return train(tiny("model=moe_xs")).folder


@pytest.fixture
def workplace(tmp_path, tiny_overrides, monkeypatch, request):
    """prepare(needs) makes the named things in an empty folder, the current one."""
    monkeypatch.chdir(tmp_path)

    def results():
        shutil.copytree(ROOT / "results" / "heads", tmp_path / "results" / "heads")

    def runs():
        assert request.getfixturevalue("trained").parent == tmp_path / "runs"

    def corpus():
        (tmp_path / "corpus.txt").write_text("To be, or not to be, that is the question.\n\n" * 400)

    def study():
        from muonlab.study.reading import read_experiment
        from muonlab.sweep import make_study

        design, overrides = read_experiment("sweep"), [*small("SEARCH", [], tiny_overrides), "study=narrow"]
        make_study(design, plain(compose_config("sweep", [*design.common, *overrides])), overrides).save()

    def mine():
        request.getfixturevalue("own_registries")
        (tmp_path / "mine.py").write_text(own_optimizer())

    makers = {"results": results, "runs": runs, "corpus.txt": corpus, "study": study, "mine.py": mine}
    return lambda needs: [makers[name]() for name in needs]


RUNS = {line: how for line, how in TABLE.items() if isinstance(how, Run)}
COMPOSED = {line: how for line, how in TABLE.items() if isinstance(how, Compose)}
LOOKED = [line for line, how in TABLE.items() if isinstance(how, Look)]


@pytest.mark.parametrize("line", RUNS)
def test_a_command_does_what_its_page_says(line, workplace, tiny_overrides, monkeypatch, tmp_path, capfd):
    how = RUNS[line]
    workplace(how.needs)
    if line == "make help":
        print(subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True).stdout)
        code = 0
    elif "muonlab.optim.check" in line:
        # In a process of its own: torch compiles no step of a plug-in whose like this process has compiled before.
        done = subprocess.run(
            [sys.executable, *line.split()[1:]], capture_output=True, text=True, cwd=tmp_path
        )
        print(done.stdout, done.stderr)
        code = done.returncode
    else:
        arguments = python_arguments(line.replace("NAME", how.name))
        code = carry_out([*arguments, *small(how.extra, arguments, tiny_overrides)], monkeypatch)
    out, err = capfd.readouterr()
    assert code == 0, out[-2000:] + err[-2000:]
    assert how.says in out
    assert not how.makes or list(tmp_path.glob(how.makes))


@pytest.mark.parametrize("line", COMPOSED)
def test_the_settings_of_a_command_are_valid(line, monkeypatch, tmp_path, workplace):
    workplace([need for need in ("mine.py",) if need in line])
    # A corpus may need a network; its digest is remembered by its cache, which is no other test's.
    monkeypatch.setattr("muonlab.data.corpus_digest", lambda *_: "0" * 16)
    arguments = python_arguments(line.replace("NAME", "boundary"))
    compose([*arguments, *([] if arguments[1] == "muonlab.data" else [f"paths.cache={tmp_path}"])])


@pytest.mark.parametrize("line", LOOKED)
def test_the_parts_of_a_command_exist(line):
    words = [word for word in shlex.split(line) if "HEAD" not in word]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:", makefile, re.M)
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2])
    else:
        assert words[0] in ("pip", "pipx", "pytest", "source", "pre-commit")
    for path in re.findall(r"\btests/[\w./]+", line):
        assert (ROOT / path).exists()


# ---------------------------------------------------------------------- nothing is forgotten
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_in_the_table(page):
    assert not [line for line in lines(page) if line not in TABLE]


def test_every_entry_of_the_table_is_on_a_page():
    written = {line for page in PAGES for line in lines(page)}
    assert not [line for line in TABLE if line not in written]


def test_lines_are_found_in_blocks_and_in_sentences(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "As `make x y=1` says\n```sh\n# no\nmake z  # so\n\npython -m a \\\n  b='c d'\n```\n"
        "`make` alone\n```\nfree text\n```\n"
    )
    assert lines(page) == ["make z", "python -m a b='c d'", "make x y=1"]


def test_a_block_is_either_typed_or_known():
    languages = {
        language
        for page in PAGES
        for language in re.findall(r"^```(\w*)\n.*?^```$", page.read_text(encoding="utf-8"), re.S | re.M)
    }
    # tests/study/test_slurm_page.py runs the blocks marked slurm and py.
    assert languages <= {"sh", "python", "yaml", "slurm", "py", ""}


# ---------------------------------------------------------------------- snippets, settings, links
def snippets():
    """The Python blocks of all pages but the one that runs as a doctest."""
    doctest = ROOT / "muonlab" / "optim" / "README.md"
    return [text for page in PAGES if page != doctest for text in blocks(page, "python")]


def test_the_record_that_a_page_reads_has_what_its_comments_say(trained):
    [code] = [text for text in snippets() if "load_run" in text]
    names = {"load_run": lambda _: load_run(trained)}
    exec("\n".join(line for line in code.splitlines() if "import" not in line), names)
    described = re.findall(r"^run\.(\w+) +# (.*)$", code, re.M)
    assert len(described) >= 5
    for attribute, comment in described:
        value = getattr(names["run"], attribute)
        said = [word.strip() for word in comment.partition(": ")[2].split(",") if word.strip() != "..."]
        if isinstance(value, str):
            assert value in comment.split(", ")
        elif attribute in ("steps", "max_logits"):
            assert len(said) >= 5
            assert set(said) <= set(value.columns)
        else:
            assert isinstance(value, pd.DataFrame)


def test_an_optimizer_of_ones_own_is_one_short_file():
    assert len(own_optimizer().splitlines()) <= 30


def test_what_a_page_adds_works_where_the_page_puts_it(tmp_path, tiny_overrides):
    """The optimizer and the model, in files of their own within the package with their configs, train and check their
    settings."""
    for folder in ("muonlab", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    [model] = [text for text in snippets() if "register_model" in text]
    [config] = [text for page in PAGES for text in blocks(page, "yaml") if "name: parallel" in text]
    for path, text in (
        ("muonlab/optim/mine.py", own_optimizer()),
        ("conf/optimizer/mine.yaml", "name: mine\nlr: 1.0e-3\nmomentum: 0.9\nweight_decay: 0.1\n"),
        ("muonlab/models/parallel.py", model),
        ("conf/model/parallel.yaml", config),
    ):
        (tmp_path / path).write_text(text, encoding="utf-8")
    small = [override for override in tiny_overrides if not override.startswith("model=")]
    command = [sys.executable, "-m", "muonlab.train", *small, "model=parallel", "optimizer=mine"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    trained, refused = (
        subprocess.run([*command, *extra], cwd=tmp_path, env=environment, capture_output=True, text=True)
        for extra in ([], ["optimizer.lr=fast"])
    )
    assert trained.returncode == 0, trained.stderr
    [config] = (tmp_path / "runs").glob("mine-lr1e-3-s1-*/config.yaml")
    assert yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["name"] == "parallel"
    assert refused.returncode == 2
    assert "optimizer.lr must be a finite number of at least 0, not 'fast'" in refused.stderr


def test_every_snippet_is_tested():
    tested = ("load_run", "register_optimizer", "register_model")
    assert all(any(name in text for name in tested) for text in snippets())


SETTINGS = sorted(
    {span for page in PAGES for span in spans(page) if re.fullmatch(r"[a-z_.]+=\S+( [a-z_.]+=\S+)*", span)}
)


REFUSED = {"optimizer.lr=fast": "optimizer.lr must be a finite number of at least 0"}


@pytest.mark.parametrize("settings", [each for each in SETTINGS if each not in REFUSED])
def test_a_setting_that_a_sentence_names_exists(settings):
    """With the model that has it, where there is one."""
    refused = []
    for config, chosen in (("train", []), ("train", ["model=moe_xs"]), ("sweep", [])):
        try:
            values = plain(compose_config(config, [*chosen, *settings.split()]))
        except MuonlabError as error:
            refused.append(str(error))
            continue
        run = {key: value for key, value in values.items() if key not in ("search", "study")}
        run["paths"] = {key: value for key, value in run["paths"].items() if key != "studies"}
        read_config(run)
        return
    pytest.fail("; ".join(refused))


@pytest.mark.parametrize("settings", REFUSED)
def test_a_setting_that_a_sentence_calls_wrong_is_refused(settings):
    assert settings in SETTINGS
    with pytest.raises(MuonlabError, match=REFUSED[settings]):
        read_config(plain(compose_config("train", settings.split())))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_readme_opens_with_the_first_three_findings():
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    first = [line for line in page.splitlines() if line[:3] in ("1. ", "2. ", "3. ")][:3]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Two commands")[0]
    assert len(first) == 3
    for line in first:
        assert line.replace("](", "](results/") in readme


def test_results_say_how_to_repeat_them_by_commands_that_exist():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    repeats = re.findall(r"^Repeat: `([^`]+)`", text, re.M)
    assert len(repeats) >= 20
    for line in repeats:
        program, *words = shlex.split(line)
        assert program == "python"
        if words[0] == "-m":
            assert words[:2] == ["-m", "muonlab.experiment"]
            assert (ROOT / "experiments" / f"{words[2]}.yaml").exists()
        else:
            assert (ROOT / words[0]).exists()
