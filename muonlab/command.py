"""How every command reads its flags and ends: exit codes, signals, and a user's mistake in one sentence."""

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

# The signals that ask a command to stop, and the seconds that it has for it once it was asked twice.
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


def listen() -> None:
    """From now on the first signal of STOPPING raises Interruption in the main thread; further ones are counted.

    So what stops in order is not torn out of it by an impatient second Ctrl-C; but GRACE seconds after that the process
    ends, whatever it is at. A signal that is ignored, as SIGHUP under `nohup`, stays so.
    """
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def times_asked() -> int:
    """How often this process was asked to stop since it listens."""
    return len(_asked)


def leave_quietly(code: int) -> None:
    """Let a signal that comes while Python ends do no more than end it, with `code`."""
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


def _end_now(code: int) -> NoReturn:
    tell(STOPPED)
    os._exit(code)


class SentenceParser(ArgumentParser):
    """Reports a wrong flag as one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raises MuonlabError."""
        raise MuonlabError(f"{message}; --help lists what there is")

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """argparse's own ignores a reader that left."""
        print(self.format_help(), end="", file=file)


def argument_parser(command: str, about: str) -> ArgumentParser:
    """The parser of `python -m <command>`, for one that takes no Hydra config; `about` is its first line of help."""
    return SentenceParser(prog=f"python -m {command}", description=about)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's body and exit: 0 or what it returns; 2 with one sentence for a MuonlabError; 130 for Ctrl-C,
    143 for SIGTERM and 129 for SIGHUP, with the sentence that the same command resumes.

    A reader that closes its pipe early (`| head -1`) ends the command in silence and with 141, as SIGPIPE ends other
    programs; letters that the terminal cannot show are replaced; and what the system refuses, such as a file on a full
    disk, is one sentence and 2.
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
        code = _stopped()  # a library's cleaning up failed, since the signal came in the middle of its work
    leave_quietly(code)
    sys.exit(code)


def _stopped() -> int:
    """Say so; the exit code."""
    tell(STOPPED)
    return 128 + (_asked[0] if _asked else signal.SIGINT)


def tell(sentence: str) -> None:
    """Say a sentence to the user, on one line, if anybody can read it."""
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
    """Let Python find nothing to write when it ends, where its output cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
