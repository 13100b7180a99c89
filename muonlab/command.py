"""How every command reads its flags and ends: exit codes, and a user's mistake in one sentence."""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
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

    A reader that closes its pipe early (`| head -1`) ends the command in silence, and letters that the terminal cannot
    show are replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except MuonlabError as error:
        print(f"muonlab: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("muonlab: stopped; rerun the same command to resume", file=sys.stderr)
        code = 130
    sys.exit(code)
