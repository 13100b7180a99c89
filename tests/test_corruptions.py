"""One wrong value anywhere in a valid command: a sentence that names it and exit code 2, without torch."""

import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from light_commands import Answer, Light

from muonlab.cli import compose_config, plain
from muonlab.settings.optimizer import OPTIMIZER_SETTINGS

CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("model", "optimizer", "schedule", "data", "trainer", "tracking")
SECONDS = 2.0
SLOW = {"torch", "lightning", "mlflow", "matplotlib"}  # to import
# What stands for true and for false besides themselves, as in YAML.
YES, NO = {"true", "yes", "on", "y", "t", "1", "1.0"}, {"false", "no", "off", "n", "f", "0", "0.0", "-0.0"}

WORDS = [
    "",
    "abc",
    "nan",
    "true",
    "no",
    "1e400",
    "-1",
    "../x",
    "a/b",
    "adamw",
    "ü 日本",
    "it's",
    "a\\b",
    "#",
    "x" * 300,
]
NUMBERS = [0, 1, -1, 2, 7, 0.5, -0.5, 3.0, 1e-300, 1e300, 1e400, -1e400, math.nan, 10**9, 10**30, 10**400]
values = st.recursive(
    st.sampled_from([*WORDS, *NUMBERS, True, False, None]) | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["query", "a", "lr"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    process = Light(folder)
    yield process
    process.close()
    assert not list(folder.iterdir()), "a checked command leaves nothing behind"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def leaves(command: str, group: str, option: str) -> list[str]:
    """Every key of a group, or of what is in none, with all keys above it."""
    chosen = [f"{group}={option}"] if group else []
    text = ["data.path=input.txt"] if option in ("text", "tokens") else []
    config = plain(compose_config(command, [*chosen, *text]))
    found: list[str] = []

    def visit(section: dict, place: str) -> None:
        for key, value in section.items():
            path = f"{place}.{key}" if place else key
            found.append(path)
            if isinstance(value, dict):
                visit(value, path)

    if group:
        visit(config[group], group)
    else:
        # Plug-ins become their digests, and their mistakes are those of tests/test_plugins.py.
        visit({key: value for key, value in config.items() if key not in (*GROUPS, "plugins")}, "")
    return found


@st.composite
def valid_commands(draw):
    """(command, its overrides, a group or "" for what is in none, the keys that this group has)."""
    command = draw(st.sampled_from(["train", "train", "train", "sweep"]))
    free = GROUPS if command == "train" else ("model", "schedule", "trainer")
    chosen = {group: draw(st.sampled_from(options(group))) for group in free}
    if command == "train":  # the settings of others are beside their rules, and come with torch
        chosen["optimizer"] = draw(st.sampled_from(sorted(OPTIMIZER_SETTINGS)))
    if command == "sweep":
        chosen |= {"data": "synthetic"}  # a sweep goes on to look at its text
    group = draw(st.sampled_from([*free, ""]))
    arguments = [f"{name}={option}" for name, option in chosen.items()]
    arguments += ["data.path=input.txt"] if chosen["data"] in ("text", "tokens") else []
    return command, arguments, leaves(command, group, chosen.get(group, ""))


def hydra_text(value: object) -> str:
    """A value as it is typed."""
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(hydra_text, value)) + "]"
    return "null" if value is None else repr(value).lower()


def held_at(answer: Answer, path: str) -> object:
    [node] = answer.held
    for key in path.split("."):
        node = node[key] if isinstance(node, dict) else vars(node)[key]
    return node


def same(held: object, given: object) -> bool:
    """Equal, with no kind of value taken for another but a whole number for a number; a mapping is merged."""
    if isinstance(given, dict):
        return isinstance(held, dict) and all(k in held and same(held[k], v) for k, v in given.items())
    if isinstance(given, list):
        return len(held) == len(given) and all(map(same, held, given))
    if isinstance(held, bool):
        return str(given).lower() in (YES if held else NO)
    # A whole number with more than 53 bits is rounded.
    return not isinstance(given, bool) and held == (float(given) if isinstance(held, float) else given)


def check_refusal(answer: Answer, names: set[str]) -> None:
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("muonlab: ")
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err
    assert any(name in answer.err for name in names), names


@settings(max_examples=300)
@given(valid_commands(), st.data())
def test_a_wrong_value_anywhere_is_one_sentence_that_names_it(light, valid, data):
    command, arguments, keys = valid
    path = data.draw(st.sampled_from(keys))
    section, _, key = path.rpartition(".")
    how = data.draw(st.sampled_from(["value"] * 6 + ["misspelt", "deleted", "added"]))
    value = data.draw(values)
    override = {
        "value": f"{path}={hydra_text(value)}",
        "misspelt": f"{path}e={hydra_text(value)}",
        "deleted": f"~{path}",
        "added": f"+{section}.zz={hydra_text(value)}" if section else f"+zz={hydra_text(value)}",
    }[how]
    answer = light.ask(command, *arguments, override)
    assert not answer.torch
    assert answer.code == 0 or answer.seconds < SECONDS, (
        "a mistake is reported soon; a sweep draws its settings first"
    )
    if answer.code == 0 and how == "value":
        assert same(held_at(answer, path), value)
    elif answer.code == 0:
        assert how == "deleted"
    else:
        check_refusal(answer, {"zz"} if how == "added" else {key, path.split(".")[0]})


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("muonlab.train", ["optimizer.lr=fast"]),
        ("muonlab.train", ["model.name=nanogpt_x"]),
        ("muonlab.sweep", ["model.num_heads=3"]),
        ("muonlab.sweep", ["search.optimizers.muon.published.lr=fast"]),
        ("muonlab.experiment", ["ablation", "optimizer.lr=fast"]),
        ("muonlab.models", ["nanogpt_s", "num_heads=0"]),
        ("muonlab.data", ["text", "path=nowhere"]),
        ("muonlab.worker", ["nowhere"]),
        ("muonlab.record", ["nowhere"]),
    ],
)
def test_a_command_reports_a_mistake_before_it_imports_what_takes_seconds(module, arguments, tmp_path):
    say = f"import atexit, sys; atexit.register(lambda: print(sorted({SLOW} & set(sys.modules))))"
    begin = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", f"{say}; sys.argv[0] = {module!r}; {begin}", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith("muonlab: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_says_what_it_trains_before_it_imports_what_takes_seconds(tmp_path):
    say = (
        "import builtins, sys; show = print\n"
        f"builtins.print = lambda *a, **k: (show(*a, **k), show(sorted({SLOW} & set(sys.modules))), sys.exit(9))"
    )
    begin = "import runpy; runpy.run_module('muonlab.train', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{say}; sys.argv[0] = 'muonlab.train'; {begin}",
            f"paths.runs={tmp_path / 'runs'}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    first, slow = done.stdout.splitlines()
    assert first == "muonclip-lr1.25e-2-s1: nanogpt on shakespeare, 700 steps of 16 x 64 tokens", done.stderr
    assert slow == "[]"
