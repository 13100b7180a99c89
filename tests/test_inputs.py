"""Commands as people type them, by a table: tests/cases/inputs.tsv says what each must give."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from light_commands import Light

from muonlab.command import run_command

TABLE = Path(__file__).parent / "cases" / "inputs.tsv"
SMALL = {
    "model": "nanogpt_xxs",
    "data": "synthetic",
    "trainer": "smoke",
    "tracking": "none",
}
QUIET = ["trainer.progress=false", "trainer.probe_batch_size=4"]
STANDS_FOR = {"LONG": "x" * 300, "DIGITS": "1" * 5000, "BRACKETS": "[" * 2000}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    id: str
    how: str
    environment: str
    command: str
    code: int
    said: str

    def arguments(self, folder: Path) -> tuple[str, list[str]]:
        """The command's name, and its arguments with everything that stands for something else replaced."""
        command, *words = shlex.split(self.command)
        chosen = {word.partition("=")[0] for word in words}
        small = [f"{group}={option}" for group, option in SMALL.items() if group not in chosen]
        if command == "train" and self.how != "light":
            small += QUIET
        given = [part for word in words for part in (small if word == "SMALL" else [word])]
        return command, [filled(word, folder) for word in given]

    def variables(self, folder: Path) -> dict[str, str]:
        pairs = [pair.partition("=") for pair in self.environment.split()]
        return {name: filled(value, folder) for name, _, value in pairs}


def filled(text: str, folder: Path) -> str:
    for name, value in STANDS_FOR.items():
        text = text.replace(name, value)
    return text.replace("W/", f"{folder}/")


def cases() -> list[Case]:
    lines = [line.split("\t") for line in TABLE.read_text("utf-8").splitlines() if not line.startswith("#")]
    return [Case(*texts, int(code), said) for *texts, code, said in lines]


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    process = Light(tmp_path_factory.mktemp("light"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Tokens that runs of several cases share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that the table names."""
    (tmp_path / "crlf.txt").write_bytes(b"hello world\r\nfoo\r\n" * 200)
    (tmp_path / "dna.txt").write_text("".join(Random(0).choices("ACGT", k=300_000)))
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    os.mkfifo(tmp_path / "pipe")
    for name, config, status in (
        ("nostatus", b"seed: 1\n", None),
        ("list", b"seed: 1\n", []),
        ("bytes", b"\xff\xfe\x00", {}),
    ):
        run = tmp_path / "damaged" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_bytes(config)
        (run / "environment.json").write_text("{}")
        (run / "routing.json").write_text("[]")
        if status is not None:
            (run / "status.json").write_text(json.dumps(status))
    (tmp_path / "damaged" / "study").mkdir()
    (tmp_path / "damaged" / "study" / "study.yaml").write_bytes(b"\xff\xfe\x00")
    return tmp_path


def run_here(command: str, arguments: list[str], monkeypatch, capfd) -> tuple[int, str, str]:
    from muonlab import sweep
    from muonlab.train.__main__ import main as train

    mains: dict[str, Callable[[], int]] = {"train": train, "sweep": sweep.main}
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit) as end:
        run_command(mains[command])
    return int(end.value.code), *capfd.readouterr()


def run_process(command: str, arguments: list[str], cwd: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", f"muonlab.{command}", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_what_is_typed_gives_what_it_should(case, folder, cache, light, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MUONLAB_CACHE", str(cache))
    for name, value in case.variables(folder).items():
        monkeypatch.setenv(name, value)
    before = set(folder.iterdir())
    command, arguments = case.arguments(folder)
    if case.how == "light":
        answer = light.ask(command, *arguments)
        code, out, err = answer.code, answer.out, answer.err
        assert not answer.torch
    elif case.how == "here":
        code, out, err = run_here(command, arguments, monkeypatch, capfd)
    else:
        code, out, err = run_process(command, arguments, folder)
    assert code == case.code, out + err
    assert "Traceback" not in out + err
    if code == 2:
        assert err.splitlines()[-1].startswith("muonlab: ")
        assert filled(case.said, folder) in err
        assert "secret" not in out + err
        left = {path.name for path in set(folder.iterdir()) - before}
        assert left <= {"runs", "cache", "inductor"}, left
        assert not [path for path in folder.glob("runs/*") if not path.name.startswith("mlflow")]
    elif case.said == "2 runs":
        assert out.count("finished\nrun: ") == 2
        assert len(list(folder.glob("runs/*/config.yaml"))) == 2
    else:
        assert filled(case.said, folder) in out + err
        # The database of the runs is in their folder, whatever that is called.
        runs = {path.parent.parent for path in folder.rglob("routing.json") if "damaged" not in path.parts}
        assert {path.parent for path in folder.rglob("mlflow.db*")} <= runs


ONE = [
    *(f"{group}={option}" for group, option in SMALL.items()),
    "study=one",
    "search.trials=1",
    "search.workers=1",
    "search.replicate_seeds=[1]",
    "~search.optimizers.adamw",
    "~search.optimizers.muonclip",
]


def test_a_sweep_sees_no_gpu_that_was_hidden_and_its_study_takes_no_other_space(folder, cache, monkeypatch):
    monkeypatch.setenv("MUONLAB_CACHE", str(cache))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, out, err = run_process("sweep", ONE, folder)
    assert code == 0, out + err
    found = [json.loads(path.read_text()) for path in folder.glob("runs/*/environment.json")]
    assert len(found) == 5, "of two slots, and of three multiples of the best learning rate"
    assert {each["environment_variables"]["CUDA_VISIBLE_DEVICES"] for each in found} == {""}

    narrower = "search.optimizers.muon.space.lr=tag(log, interval(1e-9, 1e-8))"
    code, out, err = run_process("sweep", [*ONE, narrower], folder)
    assert code == 2, out + err
    assert err.startswith("muonlab: study one was created with a different search space of muon (lr)")
    assert err.count("\n") == 1


def test_a_word_for_false_is_false(folder, cache, monkeypatch, capfd):
    """force=no does not train a finished run again, nor move its record aside."""
    monkeypatch.setenv("MUONLAB_CACHE", str(cache))
    run = [*(f"{group}={option}" for group, option in SMALL.items()), *QUIET, f"paths.runs={folder}/runs"]
    assert run_here("train", run, monkeypatch, capfd)[0] == 0
    for word in ("force=no", 'force="false"'):
        code, out, _ = run_here("train", [*run, word], monkeypatch, capfd)
        assert code == 0
        assert out.startswith("finished (earlier; force=true trains it again)")
    assert not (folder / "runs" / ".replaced").exists()
