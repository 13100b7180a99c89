"""The address of a store: with a password it is a secret, which no setting, record or sentence may hold."""

import os
import re

from muonlab.errors import MuonlabError

ADDRESS = "MUONLAB_STORAGE"
"""The environment variable for an address of a study's storage with a password, which no setting may hold."""

# The password of a URL ends at the last @ before a blank, since those that are typed hold unescaped ones.
_IN_AUTHORITY = re.compile(r"(://[^:/?@\s]*):(?!\d+(?:[/?#]|$))[^\s]*@")
_IN_QUERY = re.compile(r"([?&](?:password|sslpassword)=)[^&\s'\"]+")


def without_password(text: str) -> str:
    """`text` fit to be shown: each URL in it with *** in the place of its password."""
    return _IN_QUERY.sub(r"\1***", _IN_AUTHORITY.sub(r"\1:***@", text))


def refuse_password(address: str | None, place: str, instead: str) -> None:
    """Raises MuonlabError for an address with a password, which would be kept in records and in the shell's history;
    `place` is the setting that holds it, `instead` says where else the password may stand."""
    if address is not None and (shown := without_password(address)) != address:
        raise MuonlabError(
            f"{place}={shown} must not hold a password, since settings are kept in records; {instead}"
        )


def storage_address(setting: str | None) -> str | None:
    """Where a command keeps its queue: at the address of its settings, or else at that of the environment."""
    return with_password(setting) if setting else os.environ.get(ADDRESS)


def with_password(kept: str | None) -> str | None:
    """An address that records keep, with the password that $MUONLAB_STORAGE has for it."""
    given = os.environ.get(ADDRESS)
    return given if given and kept and public_address(given) == kept else kept


def public_address(url: str) -> str:
    """The address as records keep it, without a password: whoever opens it has one of their own."""
    return without_password(url).replace(":***@", "@")
