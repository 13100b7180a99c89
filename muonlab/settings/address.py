"""The address of a store. With a password it is a secret, which no setting, record or message may hold."""

import os
import re

from muonlab.errors import MuonlabError

ADDRESS = "MUONLAB_STORAGE"
"""The environment variable for a study's storage address with a password, which no setting may hold."""

# The password of a URL ends at the last @ before a space, since people type passwords with an unescaped @.
_IN_AUTHORITY = re.compile(r"(://[^:/?@\s]*):(?!\d+(?:[/?#]|$))[^\s]*@")
_IN_QUERY = re.compile(r"([?&](?:password|sslpassword)=)[^&\s'\"]+")


def without_password(text: str) -> str:
    """`text`, safe to show: each URL in it has *** in place of its password."""
    return _IN_QUERY.sub(r"\1***", _IN_AUTHORITY.sub(r"\1:***@", text))


def refuse_password(address: str | None, place: str, instead: str) -> None:
    """Raises MuonlabError for an address with a password, which records and the shell's history would keep.

    `place`: the setting that holds it. `instead`: where else to put the password.
    """
    if address is not None and (shown := without_password(address)) != address:
        raise MuonlabError(
            f"{place}={shown} must not hold a password, since settings are kept in records; {instead}"
        )


def storage_address(setting: str | None) -> str | None:
    """Where a command keeps its queue: at the address in its settings, or else at the one in the environment."""
    return with_password(setting) if setting else os.environ.get(ADDRESS)


def with_password(kept: str | None) -> str | None:
    """An address from a record, with the password that $MUONLAB_STORAGE has for it."""
    whole = os.environ.get(ADDRESS)
    return whole if whole and kept and public_address(whole) == kept else kept


def public_address(url: str) -> str:
    """The address as records keep it, without a password; whoever opens it brings their own."""
    return without_password(url).replace(":***@", "@")
