"""How every command reads its flags and how it ends: exit codes, signals, and mistakes reported in one sentence."""

import io
import os
import select
import signal
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import IO, NoReturn

from muonlab.errors import EnvironmentFault, MuonlabError, system_fault

# The signals that ask a command to stop, and the seconds it has left to do so once it was asked twice.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 10.0
UNREAD = 128 + signal.SIGPIPE  # the exit code of a command whose reader left
STOPPED = "stopped; rerun the same command to resume"


class Interruption(KeyboardInterrupt):
    """A signal of STOPPING asked this process to stop; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


_asked: list[int] = []
_hooks: list["Callable[[sys.UnraisableHookArgs], object]"] = []  # that `listen` replaced


def listen() -> None:
    """From now on the first signal of STOPPING raises Interruption in the main thread; later ones are only counted.

    An impatient second Ctrl-C therefore does not disturb an orderly stop, but GRACE seconds after it the process ends,
    whatever it is doing. A signal that is already ignored, such as SIGHUP under `nohup`, stays ignored.
    """
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    if sys.unraisablehook is not _lost:
        _hooks.append(sys.unraisablehook)
        sys.unraisablehook = _lost


def times_asked() -> int:
    """How often this process has been asked to stop since `listen` was called."""
    return len(_asked)


def leave_quietly(code: int) -> None:
    """From now on a signal just ends the process with `code`: Python is exiting."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(code))


def _on_signal(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
    if len(_asked) == 1:
        raise Interruption(number)
    if len(_asked) == 2:
        last = threading.Timer(GRACE, _end_now, [128 + number])
        last.daemon = True
        last.start()


def _lost(lost: "sys.UnraisableHookArgs") -> None:
    """Python drops what is raised while it collects garbage. A signal that arrived then is sent again."""
    if not isinstance(lost.exc_value, Interruption):
        _hooks[-1](lost)
        return
    _asked.clear()
    again = threading.Timer(0.01, os.kill, [os.getpid(), lost.exc_value.number])
    again.daemon = True
    again.start()


def _end_now(code: int) -> NoReturn:
    tell(STOPPED)
    os._exit(code)


class SentenceParser(ArgumentParser):
    """Reports a wrong flag in one sentence, without printing the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises MuonlabError."""
        raise MuonlabError(f"{message}; --help lists what there is")

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """argparse's own ignores a reader that left."""
        print(self.format_help(), end="", file=file)


def argument_parser(command: str, about: str) -> ArgumentParser:
    """The parser of a command `python -m <command>` without a Hydra config; `about` is the first line of its help."""
    return SentenceParser(prog=f"python -m {command}", description=about[:1].upper() + about[1:])


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's body and exit: 0 or what it returns; 2 with one sentence for a MuonlabError; 130 for Ctrl-C,
    143 for SIGTERM and 129 for SIGHUP, with a sentence on how to resume.

    A reader that closes its pipe early (`| head -1`) ends the command silently with 141, as SIGPIPE ends other
    programs. Characters that the terminal cannot show are replaced. An error of the operating system, such as a full
    disk, is reported in one sentence, with 2.
    """
    if sys.stdout is None:  # its descriptor is closed (`>&-`)
        sys.stdout = io.StringIO()
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        listen()
        try:
            code = main() or 0
        except SystemExit as end:  # argparse's, after the page of --help
            code = int(end.code or 0)
        sys.stdout.flush()
    except MuonlabError as error:
        code = UNREAD if _reader_left(error.__cause__) else 2
        if code == 2 and (not _asked or isinstance(error, EnvironmentFault)):
            tell(str(error))
        if _asked:
            code = _stopped()
    except OSError as error:
        code = UNREAD if _reader_left(error) else 2
        if code == 2:
            tell(str(system_fault(error)))
        _close_output()
    except KeyboardInterrupt:
        code = _stopped()
    except Exception:
        if not _asked:
            raise
        code = _stopped()  # a library's cleanup failed because the signal interrupted it
    leave_quietly(code)
    sys.exit(code)


def _stopped() -> int:
    """Report the stop; returns the exit code."""
    tell(STOPPED)
    return 128 + (_asked[0] if _asked else signal.SIGINT)


def tell(sentence: str) -> None:
    """Print a sentence to standard error on one line, if it can be written."""
    with suppress(OSError):
        print("muonlab:", " ".join(sentence.split()), file=sys.stderr)


def _reader_left(error: BaseException | None) -> bool:
    """Whether a pipe broke because nobody reads what this process writes, rather than one of its own."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(io.UnsupportedOperation):
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _close_output() -> None:
    """Where output cannot be written, leave nothing that Python would try to write when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
