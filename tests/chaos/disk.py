"""A small disk of its own for a round, which can be filled and made read-only: a tmpfs in a private mount namespace.

The namespace ends with the last process in it, and every mount with the namespace, however the harness ends.
"""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

SIZE = "96m"
ISOLATED = "MUONLAB_CHAOS_ISOLATED"


def isolate() -> None:
    """Start this command again in a mount namespace of its own, if the machine allows one."""
    if ISOLATED in os.environ:
        return
    os.environ[ISOLATED] = "no"
    flags = ["--mount", "--propagation", "private"]
    flags += [] if os.geteuid() == 0 else ["--map-root-user"]
    probe = ["unshare", *flags, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    if shutil.which("unshare") and subprocess.run(probe, capture_output=True).returncode == 0:
        os.environ[ISOLATED] = "yes"
        os.execvp("unshare", ["unshare", *flags, sys.executable, "-m", "chaos", *sys.argv[1:]])


def can_mount() -> bool:
    """Whether `isolate` found a namespace."""
    return os.environ.get(ISOLATED) == "yes"


def mount(folder: Path) -> None:
    """An empty disk at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True)


def unmount(folder: Path) -> None:
    """Take away what was mounted last at `folder`, even where files are open on it; nothing where nothing is."""
    subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def fill(folder: Path) -> Path:
    """Take all space that is left on the disk of `folder`; the file to be removed."""
    filler = folder / ".filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 12)) == 1 << 12:
            pass
    return filler


def make_read_only(folder: Path) -> bool:
    """Nothing can be opened for writing below `folder`, until `unmount(folder)`; whether it could be done.

    A second mount of the folder over itself: the first one cannot be made read-only while a file is open on it, nor can
    this one if somebody was quick.
    """
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    if subprocess.run(["mount", "-o", "remount,bind,ro", folder], stderr=subprocess.DEVNULL).returncode:
        unmount(folder)
        return False
    return True
