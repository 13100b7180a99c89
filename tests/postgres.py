"""A PostgreSQL server of the tests' own, from Debian's package `postgresql`, on a free port of this machine."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER, PASSWORD = "lab", "s3cret"
MISSING = "there is no PostgreSQL server to start: install Debian's package postgresql"


def programs() -> Path | None:
    """The folder with initdb and postgres; None where they are not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which("initdb")
    return folders[-1] if folders else Path(found).parent if found else None


class Server:
    """A running server; every database in it is the user's."""

    def __init__(self, port: int):
        self.port = port

    def url(self, database: str, password: str | None = PASSWORD) -> str:
        """The address of a database."""
        secret = f":{password}" if password else ""
        return f"postgresql://{USER}{secret}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """Make an empty database; its address."""
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)


@contextmanager
def server() -> Iterator[Server]:
    """A server that lives as long as the block. As root it runs as the user `postgres` or `nobody`: it refuses root."""
    binaries = programs()
    assert binaries is not None
    folder = Path(tempfile.mkdtemp(prefix="muonlab-postgres-"))
    identity = {}
    if os.getuid() == 0:
        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        owner = names.get("postgres") or names["nobody"]
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        identity = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    secret, data = folder / "password", folder / "data"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    common = dict(cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **identity)
    initdb = [binaries / "initdb", "-D", data, "-U", USER, f"--pwfile={secret}", "-A", "scram-sha-256", "-N"]
    subprocess.run(initdb, check=True, **common)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": folder,
        "fsync": "off",
        "log_destination": "stderr",
    }
    options = [text for key, value in settings.items() for text in ("-c", f"{key}={value}")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([binaries / "postgres", "-D", data, *options], **common | {"stdout": log})
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.05)
        yield Server(port)
    finally:
        process.send_signal(2)  # closes the connections that are open
        process.wait(30)
        shutil.rmtree(folder)
