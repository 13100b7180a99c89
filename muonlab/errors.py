"""What a command reports in one sentence: a mistake of the user, or what the machine around it refused."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

LONGEST = 200  # characters of what was given that a sentence repeats


class MuonlabError(Exception):
    """A mistake in what the user asked for; commands print its text alone and exit with code 2."""


class EnvironmentFault(MuonlabError):
    """What the machine, the disk, a store or another process refused, and may grant later.

    It says nothing about the settings of a run: a study never counts it as a result, and tries again.
    """


def system_fault(error: OSError) -> EnvironmentFault:
    """What the system refused, in one sentence."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return EnvironmentFault(f"the system refuses {error.filename or 'a file'}: {reason}")


def shown(value: object) -> str:
    """What was given, in a sentence: as Python writes it, but null, true and false, and not more than a line of it."""
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@contextmanager
def told_at(place: str) -> Iterator[None]:
    """Puts the place of a mistake before its sentence, where what raises it knows of none."""
    try:
        yield
    except MuonlabError as error:
        raise type(error)(f"{place}: {error}") from error


def unknown_name(kind: str, name: str, known: Iterable[str]) -> MuonlabError:
    """The error for a misspelt name: `kind` is what it should be ("optimizer"), `known` what there is."""
    known = sorted(known)
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ";"
    return MuonlabError(f"unknown {kind} '{name}'{hint} known: {', '.join(known) or 'none'}")
