"""What a command writes, and to whom: a reader that leaves, letters that cannot be shown, a disk that is full."""

import json
import os
import resource
import subprocess
import sys

import pytest

from muonlab.command import run_command


def start(module, *arguments, cwd, **settings):
    command = [sys.executable, "-m", f"muonlab.{module}", *arguments]
    return subprocess.Popen(command, cwd=cwd, text=True, stderr=subprocess.PIPE, **settings)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("train", ["--help"]),
        ("experiment", ["--help"]),
        ("models", ["nanogpt_s"]),
        ("train", ["--cfg", "job"]),
    ],
)
def test_a_reader_that_leaves_ends_the_command_in_silence(module, arguments, tmp_path):
    """As in `... | head -1`; the exit code is that of SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    process = start(module, *arguments, cwd=tmp_path, stdout=write)
    os.close(write)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 141)


@pytest.mark.parametrize("python", [[], ["-u"]])
def test_a_reader_that_leaves_in_the_middle_of_a_run_does_not_see_it_succeed(
    python, tmp_path, tiny_overrides
):
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        *python,
        "-m",
        "muonlab.train",
        *tiny_overrides,
        f"paths.runs={tmp_path / 'runs'}",
    ]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (process.communicate(timeout=120)[1], process.returncode) == ("", 141)
    [status] = tmp_path.glob("runs/*/status.json")
    assert json.loads(status.read_text())["status"] in ("interrupted", "finished")


def test_another_broken_pipe_is_a_fault(capfd):
    def main():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    assert capfd.readouterr().err == "muonlab: the system refused a file: Broken pipe\n"


def test_letters_that_the_output_cannot_show_are_replaced(tmp_path):
    (tmp_path / "text.txt").write_text("Ein schöner Tag für Übungen.\n" * 100, encoding="utf-8")
    process = start(
        "data",
        "text",
        "path=text.txt",
        f"cache={tmp_path}",
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Ein sch?ner Tag" in out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_behind_the_output_is_one_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        process = start("models", "nanogpt_s", cwd=tmp_path, stdout=full)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert err == "muonlab: the system refused a file: No space left on device\n"


def test_a_closed_output_is_nobody_to_write_to(tmp_path):
    command = f"{sys.executable} -m muonlab.models nanogpt_s >&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_becomes_too_large_is_one_sentence_and_the_run_resumes_later(tmp_path, tiny_overrides):
    small = [*tiny_overrides, f"paths.runs={tmp_path / 'runs'}"]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, resource.RLIM_INFINITY))

    settings = {"cwd": tmp_path, "stdout": subprocess.PIPE}
    process = start("train", *small, "model.d_model=32", preexec_fn=limited, **settings)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert err.startswith("muonlab: ")
    assert err.endswith("File too large\n")
    assert err.count("\n") == 1

    process = start("train", *small, "model.d_model=32", **settings)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.splitlines()[0]) == (0, "finished"), err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(28, "No space left on device", "runs/a"),
            "the system refused runs/a: No space left on device",
        ),
        (ConnectionError("the server\nis gone"), "the system refused a file: the server is gone"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(error, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"muonlab: {said}\n"
