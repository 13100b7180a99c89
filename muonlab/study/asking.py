"""An experiment's file may ask for names and numbers that the command line gives: `asks`, and `{name}` in its texts."""

import re
from collections.abc import Mapping

from muonlab.errors import MuonlabError

Given = Mapping[str, str | float]
# {optimizer}: its text; a text that is {lr} or {lr*4} as a whole: the number, or so many times it.
_NAME = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"\{(\w+)(?:\*([\d.]+))?\}")


def filled(values: object, given: Given) -> object:
    """Plain values of a file with what was given in place of the names that `asks` lists, keys included.

    `asks` is {name: example}, and an example stands for what is not given. Raises MuonlabError for a name that makes
    two keys equal, such as an arm that the file has already.
    """
    if not isinstance(values, Mapping) or not isinstance(asks := values.get("asks"), Mapping):
        return values
    known = {str(name): given.get(str(name), example) for name, example in asks.items()}
    return _filled({**values, "asks": known}, known)


def _filled(value: object, known: Mapping[str, object]) -> object:
    if isinstance(value, Mapping):
        entries = [(_filled(key, known), _filled(item, known)) for key, item in value.items()]
        if len(dict(entries)) < len(entries):
            names = [str(key) for key, _ in entries]
            twice = next(name for name in names if names.count(name) > 1)
            raise MuonlabError(f"the experiment has '{twice}' of its own; give another")
        return dict(entries)
    if isinstance(value, list):
        return [_filled(item, known) for item in value]
    if not isinstance(value, str):
        return value
    whole = _NUMBER.fullmatch(value)
    if whole and isinstance(number := known.get(whole[1]), int | float):
        return float(f"{number * float(whole[2] or 1):.6g}")
    return _NAME.sub(lambda match: str(known.get(match[1], match[0])), value)
