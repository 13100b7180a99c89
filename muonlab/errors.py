"""A mistake of the user is reported in one sentence: what is wrong, what was given, what is allowed."""

from collections.abc import Iterable
from difflib import get_close_matches


class MuonlabError(Exception):
    """A mistake in what the user asked for; commands print its text alone and exit with code 2."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> MuonlabError:
    """The error for a misspelt name: `kind` is what it should be ("optimizer"), `known` what there is."""
    known = sorted(known)
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ";"
    return MuonlabError(f"unknown {kind} '{name}'{hint} known: {', '.join(known) or 'none'}")
