"""Databases that several processes share: created by one of them, whole or not at all; the others wait for locks."""

import fcntl
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from muonlab.command import tell
from muonlab.errors import EnvironmentFault, MuonlabError
from muonlab.settings.address import without_password

PATIENCE = 90.0  # seconds that a command waits while another process holds a database
SILENCE = 3.0  # seconds of waiting before it prints a message
MAKERS = 0x6D756F6E  # a number of ours among PostgreSQL's advisory locks
ASIDE = ("", "-wal", "-shm", "-journal")  # a database is these files together


def sqlite_url(path: str | Path) -> str:
    """The URL of a database file, whatever its folders are called."""
    name = str(Path(path).absolute())
    if quote(name) != name:
        # SQLAlchemy decodes the path, but MLflow makes its parent folder undecoded: without slashes that is the root.
        name = "/" + quote(name[1:], safe="")
    return f"sqlite:///{name}"


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite URL; None for every other database, and for one in memory."""
    if url.partition(":")[0].partition("+")[0] != "sqlite":
        return None
    from sqlalchemy import make_url

    database = make_url(url).database
    return Path(database) if database and database != ":memory:" else None


def with_driver(url: str) -> str:
    """A database's URL with the driver that is installed for PostgreSQL, where it names none. Raises MuonlabError where
    that is missing."""
    scheme, sign, rest = url.partition("://")
    if scheme not in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        return url
    named = scheme.partition("+")[2]
    for driver in [named] if named else ["psycopg", "psycopg2"]:
        if find_spec(driver):
            return f"postgresql+{driver}{sign}{rest}"
    raise MuonlabError(
        f"{without_password(url)} needs the Python package {named or 'psycopg'}, which is not installed;"
        " pip install 'muonlab[postgres]'"
    )


def tables(path: Path) -> set[str]:
    """The names of a database's tables; none where there is no file. Raises sqlite3.DatabaseError for another file."""
    if not path.exists():
        return set()
    with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def make_database(path: Path, make: Callable[[Path], object]) -> None:
    """Unless `path` is a database with tables, let `make` fill a new one under a temporary name, and move it to `path`.

    Call it under `only_process(path)`. A kill never leaves half a database at `path`, and the next call removes the
    temporary one.
    """
    for leftover in path.parent.glob(f".{path.name}.*.new*"):
        leftover.unlink(missing_ok=True)
    if tables(path):
        return
    new = path.with_name(
        f".{path.name}.{uuid.uuid4().hex[:8]}.new"
    )  # MLflow remembers which ones it has filled
    try:
        make(new)
        with closing(sqlite3.connect(new)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for suffix in ASIDE[
            1:
        ]:  # of a database that somebody removed: SQLite would replay it into the new one
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        os.replace(new, path)
    finally:
        for suffix in ASIDE:
            Path(f"{new}{suffix}").unlink(missing_ok=True)


def set_aside(path: Path, why: str) -> Path:
    """Move a database and the files that belong to it out of the way, and return its new path."""
    aside = path.with_name(f"{path.name}.{why}-{datetime.now():%Y%m%d-%H%M%S-%f}")
    for suffix in reversed(ASIDE):
        if (part := Path(f"{path}{suffix}")).exists():
            os.replace(part, f"{aside}{suffix}")
    return aside


@contextmanager
def only_maker(url: str) -> Iterator[None]:
    """Hold the lock for creating the tables of an SQLite or PostgreSQL database; do nothing for other addresses.

    For PostgreSQL this also shows within 10 s whether the server can be reached.
    """
    if (path := sqlite_path(url)) is not None:
        with only_process(path):
            yield
        return
    if not url.startswith("postgresql"):
        yield
        return
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    engine = create_engine(with_driver(url), poolclass=NullPool, connect_args={"connect_timeout": 10})
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MAKERS})
        yield  # the lock ends with the connection, however the process ends


@contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Hold the lock that belongs to a database file. Raises EnvironmentFault if another process keeps it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{path}.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path.parent}: {error.strerror}") from error
    try:
        _wait(path, lambda: _locks(descriptor))
        yield
    finally:
        os.close(descriptor)


def wait_until_free(path: Path) -> None:
    """Wait, with a message, while another process locks a database. Raises EnvironmentFault after PATIENCE seconds."""
    if path.exists():
        _wait(path, lambda: _writable(path))


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _writable(path: Path) -> bool:
    with closing(sqlite3.connect(path, timeout=0.2, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            return False
    return True


def _wait(path: Path, ready: Callable[[], bool]) -> None:
    begun, announced = time.monotonic(), False
    while not ready():
        waited = time.monotonic() - begun
        if waited > PATIENCE:
            raise EnvironmentFault(
                f"{path} has been locked by another process for {waited:.0f} s; rerun the command once it is free"
            )
        if waited > SILENCE and not announced:
            tell(f"waiting for {path}, which another process has locked ...")
            announced = True
        time.sleep(0.1)
