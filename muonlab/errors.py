"""What a command reports in one sentence: a user's mistake, or a refusal of the machine around it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

LONGEST = 200  # characters of an input that a sentence repeats


class MuonlabError(Exception):
    """A mistake in what the user asked for; commands print its text alone and exit with code 2."""


class EnvironmentFault(MuonlabError):
    """The machine, the disk, a store or another process refused something that it may grant later.

    It says nothing about a run's settings: a study never counts it as a result, and tries again.
    """


def system_fault(error: OSError) -> EnvironmentFault:
    """The fault for what the operating system refused, in one sentence."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return EnvironmentFault(f"the system refused {error.filename or 'a file'}: {reason}")


def shown(value: object) -> str:
    """A value as a sentence shows it: as Python writes it, but with null, true and false, and cut to about a line."""
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@contextmanager
def located(place: str) -> Iterator[None]:
    """Prefixes a mistake's sentence with its place, where the code that raises it does not know it."""
    try:
        yield
    except MuonlabError as error:
        raise type(error)(f"{place}: {error}") from error


def unknown_name(kind: str, name: str, known: Iterable[str]) -> MuonlabError:
    """The error for a misspelt name: `kind` is what it should name ("optimizer"), `known` the names that exist."""
    known = sorted(known)
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ";"
    return MuonlabError(f"unknown {kind} '{name}'{hint} known: {', '.join(known) or 'none'}")
