"""How every command reads its flags and ends: exit codes, and a user's mistake in one sentence."""

import io
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from muonlab.errors import MuonlabError


class SentenceParser(ArgumentParser):
    """Reports a wrong flag as one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raises MuonlabError."""
        raise MuonlabError(f"{message}; --help lists what there is")


def argument_parser(command: str, about: str) -> ArgumentParser:
    """The parser of `python -m <command>`, for one that takes no Hydra config; `about` is its first line of help."""
    return SentenceParser(prog=f"python -m {command}", description=about)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's body and exit: 0 or what it returns; 2 with one sentence for a MuonlabError; 130 for Ctrl-C.

    A reader that closes its pipe early (`| head -1`) ends the command in silence, letters that the terminal cannot show
    are replaced, and what the system refuses, such as a file on a full disk, is one sentence and 2.
    """
    if sys.stdout is None:  # its descriptor is closed (`>&-`)
        sys.stdout = io.StringIO()
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except MuonlabError as error:
        tell(str(error))
        code = 2
    except BrokenPipeError:
        _close_output()
        code = 0
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        tell(f"the system refuses {error.filename or 'a file'}: {reason}")
        _close_output()
        code = 2
    except KeyboardInterrupt:
        tell("stopped; rerun the same command to resume")
        code = 130
    sys.exit(code)


def tell(sentence: str) -> None:
    """Say a sentence to the user, on one line, if anybody can read it."""
    with suppress(OSError):
        print("muonlab:", " ".join(sentence.split()), file=sys.stderr)


def _close_output() -> None:
    """Let Python find nothing to write when it ends, where the standard output cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
