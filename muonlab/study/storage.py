"""The Optuna storage that holds a study's queue: a journal file, or any database that Optuna supports."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from muonlab.errors import MuonlabError
from muonlab.record.database import (
    PATIENCE,
    make_database,
    only_maker,
    sqlite_path,
    sqlite_url,
    wait_until_free,
    with_driver,
)
from muonlab.record.store import store_fault
from muonlab.settings.address import without_password
from muonlab.study.journal import Journal

# Raised where a database cannot be reached, read or written, which may work a little later.
REFUSALS = (OSError, SQLAlchemyError, sqlite3.Error, StorageInternalError)


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The Optuna storage at a URL; None: a journal file in the study's folder, which several processes may share.

    A new database is made by one process, and an SQLite file appears complete or not at all. Raises MuonlabError for a
    wrong URL, EnvironmentFault for a storage that cannot be reached or stays locked.
    """
    with one_sentence(url), _refused_addresses(url):
        if url is None:
            folder.mkdir(parents=True, exist_ok=True)
            return JournalStorage(Journal(str(folder / "journal.log")))
        path = sqlite_path(url)
        if path is not None and not path.parent.is_dir():
            raise MuonlabError(
                f"search.storage={url}: unable to open database file: {path.parent} is not a folder"
            )
        with only_maker(url):
            if path is not None:
                wait_until_free(path)
                make_database(path, lambda new: RDBStorage(sqlite_url(new)).engine.dispose())
            return optuna.storages.get_storage(RDBStorage(with_driver(url), engine_kwargs=_engine(url)))


@contextmanager
def _refused_addresses(url: str | None) -> Iterator[None]:
    """Raises MuonlabError for the plain errors of SQLAlchemy and Optuna about an address: a missing driver, a port that
    is not a number, tables of another version of Optuna."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as error:
        raise MuonlabError(str(store_fault(_called(url), error))) from error


@contextmanager
def one_sentence(url: str | None = None) -> Iterator[None]:
    """Turns what a database, its driver or the system refused into one sentence without a password.

    That is an EnvironmentFault, or another MuonlabError where the address is wrong. Anything else is a bug, which
    another try does not mend, and passes through. `url`: what to call the storage; None: the study's.
    """
    try:
        yield
    except MuonlabError:
        raise
    except ArgumentError as error:
        raise MuonlabError(
            f"cannot use search.storage={without_password(str(url))}: it is not a URL"
        ) from error
    except REFUSALS as error:
        raise store_fault(_called(url), error) from error


def _called(url: str | None) -> str:
    return f"search.storage={without_password(url)}" if url else "the study's storage"


def _engine(url: str) -> dict[str, object]:
    if sqlite_path(url) is not None:
        return {"connect_args": {"timeout": PATIENCE}}
    if url.startswith("postgresql"):
        # No connection is kept open: a server has about a hundred for all workers, and closes them when it restarts.
        return {"poolclass": NullPool, "connect_args": {"connect_timeout": 10}}
    return {}
